"""One seed per run and purpose, so that no draw depends on what was drawn elsewhere."""

from __future__ import annotations

import hashlib
import operator

__all__ = ["derive_seed"]


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for one purpose within a run, e.g. ``derive_seed(7, "shuffle", 3, 0)``.

    The same arguments give the same seed on every machine; different ones give seeds that have
    nothing to do with each other (SHA-256 over the parts, length-prefixed so that they cannot
    run into each other; text and number differ: ``"3"`` is not ``3``).
    """
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        if isinstance(part, str):
            text = b"str:" + str.__str__(part).encode()
        else:
            text = b"int:" + str(operator.index(part)).encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1
