"""Foreign text, made safe for terminals and logs."""

from __future__ import annotations

import unicodedata

__all__ = ["printable", "printable_lines"]

_MAX_CHARACTERS = 2000


def printable(text: str) -> str:
    """Return one line of text in which no character acts: what would is shown as its code.

    That holds for control characters, so for escape sequences and line breaks; for characters that
    turn or hide text; and for what is no valid Unicode. Too long a text ends with "…".
    """
    if text.isprintable() and len(text) <= _MAX_CHARACTERS:
        return text
    shown = "".join(map(_shown, text[:_MAX_CHARACTERS]))
    return shown if len(text) <= _MAX_CHARACTERS else f"{shown}…"


def printable_lines(text: str) -> str:
    """Return text of several lines, each as of `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
