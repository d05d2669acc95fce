"""Checksum of a JSON body, which travels in a header; a frame has its own."""

from __future__ import annotations

from xxhash import xxh3_64

from protocol.errors import DamagedFrame
from protocol.wire import CHECKSUM_HEADER

__all__ = ["JSONChecksum", "Pieces"]

Pieces = bytes | bytearray | memoryview


class JSONChecksum:
    """Computes the checksum of a body that arrives in pieces.

    Args:
        key: the request's idempotency key; empty: it has none, or the body is a response's.
    """

    def __init__(self, key: str = "") -> None:
        self._digest = xxh3_64(key.encode("latin-1", "replace") + b"\n")

    def update(self, piece: Pieces) -> JSONChecksum:
        """Add the body's next bytes."""
        self._digest.update(piece)
        return self

    def text(self) -> str:
        """Return the checksum as the header has it: 16 hexadecimal digits."""
        return self._digest.hexdigest()

    def check(self, declared: str) -> None:
        """Compare with the checksum in the header.

        Raises:
            DamagedFrame: they differ: the body, its key or the header changed on the way.
        """
        if declared != self.text():
            raise DamagedFrame(
                "the body is not what was sent: bytes changed on the way",
                field=CHECKSUM_HEADER,
                limit=self.text(),
                value=declared[:80],
                hint="send it again",
            )
