"""Files with the read tokens of participants' samples during round 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK = 1024  # samples in memory at a time


@dataclass(frozen=True)
class SampleFeatures:
    """One participant's flattened read tokens, float16 [n, q], in a file.

    Attributes:
        path: path of the file, which is removed with its folder.
        samples: number of samples n.
        numbers: number of elements q of one sample.
    """

    path: Path
    samples: int
    numbers: int

    def write(self, start: int, flat: Tensor) -> None:
        """Write the samples [b, q] from position ``start`` on."""
        self._open("r+" if start else "w+")[start : start + len(flat)] = flat.cpu().numpy()

    def chunks(self) -> Iterator[Tensor]:
        """Yield all samples in order, as float32 [b, q]."""
        stored = self._open("r")
        for start in range(0, self.samples, CHUNK):
            yield torch.from_numpy(np.asarray(stored[start : start + CHUNK], dtype=np.float32))

    def _open(self, mode: str) -> np.memmap[tuple[int, ...], np.dtype[np.float16]]:
        shape = (self.samples, self.numbers)
        return np.memmap(self.path, dtype=np.float16, mode=mode, shape=shape)  # type: ignore[call-overload, no-any-return]


def all_chunks(participants: Sequence[SampleFeatures]) -> Iterator[Tensor]:
    """Yield the samples of all participants, one participant after the other."""
    for features in participants:
        yield from features.chunks()
