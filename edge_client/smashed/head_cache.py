"""What the frozen head makes of images alone: constant, so it is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edge_client.data import BatchReader
from split_model import Head, for_the_tail, needed_tokens

# Matrix products of another size may differ in their last bit. A head that always sees as many
# images gives a sample the same smashed data in whatever company it is asked for.
_GROUP = 16


class HeadOutputs:
    """Smashed data of one set of images, without prompts.

    Of each sample, the tokens that a tail of norm and classifier reads are remembered, so that
    scoring and the local-loss update never run the head again.

    Args:
        head: frozen.
        samples: the set.
        cache_bytes: how much memory the remembered tokens may take.
    """

    def __init__(self, head: Head, samples: BatchReader, cache_bytes: int) -> None:
        self.head = head
        self._samples = samples
        num_tokens = needed_tokens(head.settings)
        tokens = head.sizes.tokens if num_tokens is None else num_tokens
        row_bytes = tokens * head.sizes.width * 4
        fits = len(samples) * row_bytes <= cache_bytes
        rows = len(samples) if fits else 0
        self._tokens = torch.empty(rows, tokens, head.sizes.width)  # [n, T', D]
        self._known = torch.zeros(rows, dtype=torch.bool)

    @torch.no_grad()
    def smashed(self, positions: Tensor, view: int | None = None) -> Tensor:
        """Smashed data [B, T, D] of the samples at these positions [B].

        ``view`` names one of a sample's augmented views; None: as it is.
        """
        images, _ = self._samples.read(positions, epoch=view)
        smashed = torch.cat([self.head(group)[:rows] for group, rows in _groups(images)])
        if view is None and len(self._known):
            self._tokens[positions] = for_the_tail(self.head.settings, smashed)
            self._known[positions] = True
        return smashed

    def for_tail(self, positions: Tensor, view: int | None = None) -> Tensor:
        """What the tail reads of them, [B, T', D]; the head runs for those not known yet."""
        if view is not None or not len(self._known):
            return for_the_tail(self.head.settings, self.smashed(positions, view))
        unknown = positions[~self._known[positions]]
        if len(unknown):
            self.smashed(unknown)
        return self._tokens[positions]


def _groups(images: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Images [b, 3, S, S] in groups of one size, the last one filled up, and how many count."""
    for group in images.split(_GROUP):
        rows = len(group)
        if rows < _GROUP:
            filling = group[-1:].expand(_GROUP - rows, -1, -1, -1)
            group = torch.cat([group, filling])
        yield group, rows
