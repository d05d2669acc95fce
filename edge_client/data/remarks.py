"""Remarks on files and classes, such as the reason for skipping one, and their names as text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath


@dataclass(frozen=True)
class Remark:
    """A remark on a file, folder or class: why it is skipped, or why it is unusual."""

    path: str
    reason: str


def as_text(path: str | PathLike[str]) -> str:
    r"""Return a path as valid text, with ``\xNN`` for control characters and invalid bytes.

    Python represents a name that is not valid UTF-8, such as one in Latin-1, with surrogates.
    Terminals and JSON parsers refuse them. Any other name is returned unchanged.
    """
    name = fspath(path)
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that does not represent a byte
        raw = name.encode("utf-8", "backslashreplace")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(
        f"\\x{ord(each):02x}" if unicodedata.category(each) == "Cc" else each for each in text
    )


def class_name(folder: str) -> str:
    """Return the class name of a folder's name: valid text in Unicode normal form C.

    macOS writes names in form D, in which an accent is a separate character.
    """
    return compose(as_text(folder))


def compose(text: str) -> str:
    """Return a text in Unicode normal form C, in which equal-looking names are equal."""
    return unicodedata.normalize("NFC", text)


def summarise(remarks: Iterable[Remark], limit: int = 5) -> str:
    """Return the first remarks and the number of the others, in one line."""
    listed = list(remarks)
    entries = "; ".join(f"{entry.path} ({entry.reason})" for entry in listed[:limit])
    more = f"; and {len(listed) - limit} more" if len(listed) > limit else ""
    return f"{entries}{more}"


def group_by_reason(skipped: Iterable[Remark], limit: int = 3) -> list[Remark]:
    """Return the first remarks with each reason, and one that counts the others."""
    counts: Counter[str] = Counter()
    shown: list[Remark] = []
    for entry in skipped:
        counts[entry.reason] += 1
        if counts[entry.reason] <= limit:
            shown.append(entry)
    return shown + [
        Remark(f"{count - limit} more", reason) for reason, count in counts.items() if count > limit
    ]
