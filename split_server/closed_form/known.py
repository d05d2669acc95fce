"""What the server knows of a participant's samples, in a file until the run is over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from split_server.closed_form.sums import Sums
from split_server.storage.tensor_files import read_tensors, write_named_tensors


@dataclass(frozen=True)
class KnownSamples:
    """One participant's features and sums. They decide what its later updates can be.

    Attributes:
        features: as the device has decoded them, [n, r], float32.
        sums: in each class; None: it has not sent them.
        disagrees: share of its samples whose labels agree with the others', where that is so low
            that its data and updates do not count; None: they count.
    """

    features: Tensor
    sums: Sums | None = None
    disagrees: float | None = None


def write_known(path: Path, known: KnownSamples) -> None:
    """Write what is known; it is durable on return. The features are rounded to float16."""
    tensors: dict[str, Tensor] = {"features": known.features.half()}
    if known.sums is not None:
        tensors |= {"sums": known.sums.features, "counts": known.sums.counts}
    if known.disagrees is not None:
        tensors["disagrees"] = torch.tensor(known.disagrees, dtype=torch.float64)
    write_named_tensors(path, tensors)


def read_known(path: Path) -> KnownSamples | None:
    """Read what `write_known` wrote; None: nothing is known.

    Raises:
        DamagedFile: it is not what was written.
    """
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    sums = Sums(tensors["sums"], tensors["counts"]) if "sums" in tensors else None
    disagrees = float(tensors["disagrees"]) if "disagrees" in tensors else None
    return KnownSamples(tensors["features"].float(), sums, disagrees)
