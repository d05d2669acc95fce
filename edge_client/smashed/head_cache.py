"""The frozen head's outputs without prompts: constant, so they are computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from split_model.parts.head import Head
from split_model.parts.tail import for_the_tail, needed_tokens

# Matrix products of another size may differ in their last bit. With a constant batch size a
# sample's smashed data do not depend on the other samples of a call.
_GROUP = 16


class HeadOutputs:
    """Smashed data of one set of images, without prompts.

    The tokens that the tail reads are cached for every sample, or for none if they do not fit, so
    that scoring and the local update run the head once.

    Args:
        head: frozen.
        samples: reads the set's images.
        cache_bytes: memory budget of the cached tokens.
    """

    def __init__(self, head: Head, samples: BatchReader, cache_bytes: int) -> None:
        self.head = head
        self._samples = samples
        num_tokens = needed_tokens(head.settings)
        tokens = head.sizes.tokens if num_tokens is None else num_tokens
        row_bytes = tokens * head.sizes.width * 4
        fits = len(samples) * row_bytes <= cache_bytes and not head.settings.depths
        rows = len(samples) if fits else 0
        self._tokens = torch.empty(rows, tokens, head.sizes.width)  # [n, T', D]
        self._filled = torch.zeros(rows, dtype=torch.bool)

    @torch.no_grad()
    def smashed(self, positions: Tensor, view: int | None = None) -> Tensor:
        """Compute the smashed data [B, T, D] of the samples at these positions [B].

        Args:
            positions: [B].
            view: number of an augmented view; None: not augmented.
        """
        images, _ = self._samples.read(positions, epoch=view)
        smashed = torch.cat([self.head(group)[:rows] for group, rows in _groups(images)])
        if view is None and len(self._filled):
            self._tokens[positions] = for_the_tail(self.head.settings, smashed)
            self._filled[positions] = True
        return smashed

    def for_tail(self, positions: Tensor, view: int | None = None) -> Tensor:
        """Return the tokens that the tail reads, [B, T', D], computed unless they are cached."""
        if view is not None or not len(self._filled):
            return for_the_tail(self.head.settings, self.smashed(positions, view))
        absent = positions[~self._filled[positions]]
        if len(absent):
            self.smashed(absent)
        return self._tokens[positions]


def _groups(images: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield images [b, 3, S, S] in groups of `_GROUP`, the last one padded, and their number."""
    for group in images.split(_GROUP):
        rows = len(group)
        if rows < _GROUP:
            padding = group[-1:].expand(_GROUP - rows, -1, -1, -1)
            group = torch.cat([group, padding])
        yield group, rows
