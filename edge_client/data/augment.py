"""Small random changes to training images, the same ones for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.data.errors import PreprocessingError
from edge_client.data.sampling import generator


@dataclass(frozen=True)
class Augmentation:
    """A horizontal flip of every second image, and a shift whose gap repeats the edge.

    seed, epoch and an image's position fix what happens to it, whatever batch it comes in.
    Raises PreprocessingError.
    """

    seed: int
    flip: bool = True
    max_shift: float = 0.125  # of the image's side, either way

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_shift <= 0.5:
            raise PreprocessingError("max_shift", limit="0 to 0.5", value=self.max_shift)

    def apply(self, images: Tensor, positions: Tensor, epoch: int) -> Tensor:
        """Changed copies: uint8 (b, 3, S, S) at these positions, int64 (b,), → the same shape."""
        side = images.shape[-1]
        reach = round(self.max_shift * side)
        places = torch.arange(side)
        changed = torch.empty_like(images)
        for slot, position in enumerate(positions.tolist()):
            rng = generator(self.seed, "augment", epoch, position)
            down, right = rng.integers(-reach, reach + 1, size=2).tolist()
            mirrored = self.flip and bool(rng.integers(2))
            rows = (places + down).clamp(0, side - 1)
            columns = (places + right).clamp(0, side - 1)
            if mirrored:
                columns = columns.flip(0)
            changed[slot] = images[slot, :, rows][:, :, columns]
        return changed
