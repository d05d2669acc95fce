"""The frozen head in NumPy: images to smashed data."""

from __future__ import annotations

import numpy as np

from edge_client.head.blocks import Block, Tensors, read_norm
from edge_client.head.layers import Floats, Linear
from protocol.architecture import Architecture
from protocol.errors import WrongShape

_TOKENS = 1024  # of the images that are computed together: their hidden layers fit in a cache


class NumpyHead:
    """Patch embedding and first blocks.

    Args:
        architecture: of the backbone.
        tensors: the head's, by timm's names.
        cut: number of blocks.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another shape than the architecture.
    """

    def __init__(self, architecture: Architecture, tensors: Tensors, cut: int) -> None:
        self.architecture = architecture
        kernel = tensors["patch_embed.proj.weight"]
        # The kernel's channels come last: then a patch is read in longer pieces.
        rows = np.ascontiguousarray(kernel.transpose(0, 2, 3, 1)).reshape(len(kernel), -1)
        self._embed = Linear.of(rows, tensors.get("patch_embed.proj.bias"))
        first = architecture.first_epsilon
        self._norms = [
            read_norm(architecture, tensors, name, first) if f"{name}.weight" in tensors else None
            for name in ("patch_embed.norm", "norm_pre")
        ]
        prefix = [tensors[name][0] for name in architecture.prefix]
        self._prefix = np.concatenate(prefix) if prefix else np.empty((0, architecture.width), "f4")
        positions = tensors["pos_embed"][0] if architecture.positions != "none" else None
        self._positions = positions  # [T or N, D]
        self._blocks = [Block(architecture, tensors, number) for number in range(cut)]
        expected = (architecture.prefix_tokens, architecture.width)
        if self._prefix.shape != expected:
            raise ValueError(f"the prefix is {self._prefix.shape}, not {expected}")

    def __call__(self, images: Floats) -> Floats:
        """Compute the smashed data [B, T, D] of images [B, 3, S, S].

        Raises:
            WrongShape: images of another size.
        """
        architecture = self.architecture
        height, width = (
            side * patch for side, patch in zip(architecture.grid, architecture.patch, strict=True)
        )
        if images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise WrongShape(
                "the head takes images of another shape",
                field="images",
                limit=["batch", 3, height, width],
                value=list(images.shape),
            )
        together = max(1, _TOKENS // architecture.tokens)
        smashed = np.empty((len(images), architecture.tokens, architecture.width), np.float32)
        for start in range(0, len(images), together):
            tokens = self._embedded(images[start : start + together])
            for block in self._blocks:
                tokens = block(tokens)
            smashed[start : start + together] = tokens
        return smashed

    def _embedded(self, images: Floats) -> Floats:
        """Compute the first block's input [b, T, D]."""
        (rows, columns), (high, wide) = self.architecture.grid, self.architecture.patch
        prefix = self.architecture.prefix_tokens
        patches = images.reshape(len(images), 3, rows, high, columns, wide)
        patches = patches.transpose(0, 2, 4, 3, 5, 1).reshape(len(images) * rows * columns, -1)
        image = self._embed(patches)
        if self._norms[0] is not None:
            image = self._norms[0](image)
        tokens = np.empty(
            (len(images), self.architecture.tokens, self.architecture.width), np.float32
        )
        tokens[:, :prefix] = self._prefix
        tokens[:, prefix:] = image.reshape(len(images), rows * columns, -1)
        if self._positions is not None:
            where = tokens if self.architecture.positions == "all" else tokens[:, prefix:]
            where += self._positions
        return tokens if self._norms[1] is None else self._norms[1](tokens)
