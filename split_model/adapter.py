"""The adapter: one bottleneck that acts behind every block of the head, tuned on the device."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STANDARD_DEVIATION = 0.02


class Adapter(nn.Module):
    """D -> W -> D with a GELU between, beside a path that changes nothing.

    One for all blocks, as FedPEFT has it (arXiv 2210.01708); the form is that of Houlsby et al.
    (arXiv 1902.00751). On the meta device until its part is filled.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner, device="meta")
        self.up = nn.Linear(inner, width, device="meta")

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        changed: Tensor = self.up(F.gelu(self.down(tokens)))
        return tokens + changed


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """First values of one tensor: the way up is zero, so that tuning begins at the backbone."""
    if not name.endswith("down.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * STANDARD_DEVIATION
