"""One seed for each run and purpose, so that random draws do not depend on each other."""

from __future__ import annotations

import hashlib
import operator

__all__ = ["derive_seed"]


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose within a run, e.g. ``derive_seed(7, "shuffle", 3, 0)``.

    The same arguments give the same seed on every machine. Different arguments give unrelated
    seeds: SHA-256 over the parts, each with its length in front so that they cannot run into each
    other, and with its type (``"3"`` is not ``3``).
    """
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        if isinstance(part, str):
            text = b"str:" + str.__str__(part).encode()
        else:
            text = b"int:" + str(operator.index(part)).encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1
