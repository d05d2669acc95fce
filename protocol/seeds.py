"""Seeds for each purpose within a run, so that random draws are independent."""

from __future__ import annotations

import hashlib
import operator

__all__ = ["derive_seed"]


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose within a run, e.g. ``derive_seed(7, "shuffle", 3, 0)``.

    Equal arguments give equal seeds on every machine, and different arguments give independent
    seeds. The seed is a SHA-256 of all parts, each preceded by its length and its type, so that
    ``"3"`` and ``3`` differ.

    Args:
        run_seed: seed of the run.
        purpose: texts and integers that identify the purpose.
    """
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        if isinstance(part, str):
            text = b"str:" + str.__str__(part).encode()
        else:
            text = b"int:" + str(operator.index(part)).encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1
