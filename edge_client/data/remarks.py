"""What is said of files and classes: their names as text, and why one is left out."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath


@dataclass(frozen=True)
class Skipped:
    """A file, folder or class, and why it is left out, or what is odd about it."""

    path: str
    reason: str


def as_text(path: str | PathLike[str]) -> str:
    r"""Return a path as valid text: bytes that are no text, and control characters, as ``\xNN``.

    A name in Latin-1, on a file system that expects UTF-8, reaches Python with surrogates, which
    no terminal and no JSON parser takes. Any other name is returned as it is.
    """
    name = fspath(path)
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that does not stand for a byte
        raw = name.encode("utf-8", "backslashreplace")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(
        f"\\x{ord(each):02x}" if unicodedata.category(each) == "Cc" else each for each in text
    )


def class_name(folder: str) -> str:
    """Return the class that a folder's name stands for: valid text in Unicode normal form C.

    macOS writes names in form D, in which an accent is a character of its own.
    """
    return compose(as_text(folder))


def compose(text: str) -> str:
    """Return a text in Unicode normal form C, in which equal-looking names are equal."""
    return unicodedata.normalize("NFC", text)


def summarise(remarks: Iterable[Skipped], limit: int = 5) -> str:
    """Return the first remarks in one line, and how many more there are."""
    listed = list(remarks)
    entries = "; ".join(f"{entry.path} ({entry.reason})" for entry in listed[:limit])
    more = f"; and {len(listed) - limit} more" if len(listed) > limit else ""
    return f"{entries}{more}"


def group_by_reason(skipped: Iterable[Skipped], limit: int = 3) -> list[Skipped]:
    """Name the first few entries of each reason, and count the others."""
    counts: Counter[str] = Counter()
    shown: list[Skipped] = []
    for entry in skipped:
        counts[entry.reason] += 1
        if counts[entry.reason] <= limit:
            shown.append(entry)
    return shown + [
        Skipped(f"{count - limit} more", reason)
        for reason, count in counts.items()
        if count > limit
    ]
