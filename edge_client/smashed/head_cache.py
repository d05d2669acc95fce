"""The frozen head's outputs without prompts: constant, so they are computed once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_client.data.batches import BatchReader, Floats
from edge_client.data.image_set import Labels
from edge_client.model import Model
from protocol.wire import FLOAT32_BYTES

# Matrix products of another size may differ in their last bit. With a constant batch size a
# sample's smashed data do not depend on the other samples of a call.
_GROUP = 16


class HeadOutputs:
    """Smashed data of one set of images, without prompts.

    The tokens that the tail reads are cached for every sample, or for none if they do not fit, so
    that scoring and the local update run the head once.

    Args:
        model: its head is frozen.
        samples: reads the set's images.
        cache_bytes: memory budget of the cached tokens.
    """

    def __init__(self, model: Model, samples: BatchReader, cache_bytes: int) -> None:
        self.model = model
        self._samples = samples
        tokens = model.cached_tokens
        fits = len(samples) * tokens * model.width * FLOAT32_BYTES <= cache_bytes
        rows = len(samples) if fits and tokens else 0
        self._tokens = np.empty((rows, tokens, model.width), np.float32)  # [n, T', D]
        self._filled = np.zeros(rows, np.bool_)

    def smashed(self, positions: Labels, view: int | None = None) -> Floats:
        """Compute the smashed data [B, T, D] of the samples at these positions [B].

        Args:
            positions: [B].
            view: number of an augmented view; None: not augmented.
        """
        images, _ = self._samples.read(positions, epoch=view)
        smashed = np.concatenate(
            [self.model.smashed(group)[:rows] for group, rows in _groups(images)]
        )
        if view is None and len(self._filled):
            self._tokens[positions] = self.model.for_tail(smashed)
            self._filled[positions] = True
        return smashed

    def for_tail(self, positions: Labels, view: int | None = None) -> Floats:
        """Return the tokens that the tail reads, [B, T', D], computed unless they are cached."""
        if view is not None or not len(self._filled):
            return self.model.for_tail(self.smashed(positions, view))
        absent = positions[~self._filled[positions]]
        if len(absent):
            self.smashed(absent)
        return self._tokens[positions]


def _groups(images: Floats) -> Iterator[tuple[Floats, int]]:
    """Yield images [b, 3, S, S] in groups of `_GROUP`, the last one padded, and their number."""
    for start in range(0, len(images), _GROUP):
        group = images[start : start + _GROUP]
        rows = len(group)
        if rows < _GROUP:
            group = np.concatenate([group, np.repeat(group[-1:], _GROUP - rows, axis=0)])
        yield group, rows
