"""Product quantisation: runs of four numbers become indices into a codebook that travels along."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
    find_extremes,
    from_buffer,
    is_within,
    matrix_shape,
    max_magnitude,
    power_of_two_above,
    range_error,
    rows_per_chunk,
    to_buffer,
    to_device,
    to_matrix,
)
from protocol.errors import MalformedFrame

RUN = 4  # numbers that share an index

_ENTRIES = 256  # of a codebook, as many as a byte can name

_LARGEST = 2.0**125

_ITERATIONS = 8

_FITTED = 16_384  # vectors that the codebook is fitted to, of a tensor that has more


class ProductQuantiser(FixedSizeCodec):
    """One byte for every four neighbours in a row of the last dimension.

    Product quantisation as in FedLite (arXiv 2201.11865), with one codebook for all positions: the
    vectors of four numbers (the last one of a row is filled up with zeros) are clustered by
    k-means with 256 centres. Centres are found on at most 16 384 vectors, spread evenly; at the
    end each becomes the mean of all vectors that were assigned to it. Nothing is drawn at random.

    No single element has a bound of its own. Over the tensor, the squared error is at most the sum
    of squared distances of its vectors from their mean, and so at most the tensor's squared norm.
    A tensor with at most 256 different vectors, if it has no more than 16 384, is exact but for
    rounding. For Gaussian numbers the relative error is near 0.3.

    Rounding at random is not on offer: a generator is left unused. NaN, infinity and magnitudes
    above 2¹²⁵ are refused.

    Ratio to float32: near 16. A row of D numbers takes ⌈D / 4⌉ bytes, the codebook 16 bytes for
    each of its entries, which are 256 or, if there are fewer, as many as the vectors.
    """

    name = "pq"

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        plain = to_matrix(tensor).to(torch.float32)
        largest = max_magnitude(plain)
        if not largest <= _LARGEST:  # NaN too
            raise range_error(self.name, _LARGEST, largest)
        unit = power_of_two_above(largest)
        vectors = F.pad(plain / unit, (0, -plain.shape[1] % RUN)).view(-1, RUN)
        codes, codebook = _cluster(vectors)
        return [to_buffer(codes), to_buffer(codebook * unit)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        vectors = math.prod(_vectors(shape))
        return [vectors, min(vectors, _ENTRIES) * RUN * 4]

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        rows, width = matrix_shape(shape)
        vectors = _vectors(shape)
        entries = min(math.prod(vectors), _ENTRIES)
        codes = from_buffer(buffers[0], torch.uint8, *vectors)
        codebook = from_buffer(buffers[1], torch.float32, entries, RUN)
        if entries and int(codes.max()) >= entries:
            raise MalformedFrame(
                "a code names no entry of the codebook",
                field="codes",
                limit=entries - 1,
                value=int(codes.max()),
            )
        if not is_within(codebook, -2 * _LARGEST, 2 * _LARGEST):
            raise MalformedFrame(
                "an entry of the codebook is out of range",
                field="codebook",
                limit=2 * _LARGEST,
                value=find_extremes(codebook),
            )
        codes, codebook = to_device(codes, device), to_device(codebook, device)
        decoded = torch.empty(rows, width, dtype=torch.float32, device=device)
        at_once = rows_per_chunk(width, decoded.device)
        for out, part in zip(decoded.split(at_once), codes.split(at_once), strict=True):
            out.copy_(F.embedding(part.to(torch.int64), codebook).flatten(1)[:, :width])
        return decoded.reshape(tuple(shape))


def _vectors(shape: Sequence[int]) -> tuple[int, int]:
    """How many rows there are, and how many vectors in each."""
    rows, width = matrix_shape(shape)
    return rows, -(-width // RUN)


def _cluster(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """k-means of vectors [N, 4] of magnitudes up to 1: uint8 codes [N] and codebook [K, 4]."""
    entries = min(len(vectors), _ENTRIES)
    if entries == 0:
        return vectors.new_empty(0, dtype=torch.uint8), vectors
    centres = _fit(_spread(vectors), entries)
    codes = _nearest(vectors, centres)
    means, counts = _means(vectors, codes, entries)
    return codes.to(torch.uint8), torch.where(counts > 0, means, 0.0)


def _spread(vectors: Tensor) -> Tensor:
    """At most `_FITTED` of the vectors, from everywhere, whatever repeats along the tensor.

    A step that has no factor in common with the number of vectors meets each of them once, and
    each position within a row equally often; the golden section spreads a part of them evenly.
    """
    count = len(vectors)
    if count <= _FITTED:
        return vectors
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) > 1:
        step += 1
    places = torch.arange(_FITTED, dtype=torch.int64, device=vectors.device) * step % count
    return vectors[places]


def _fit(vectors: Tensor, entries: int) -> Tensor:
    """Lloyd's algorithm, begun from different vectors in sorted order."""
    different: Tensor = torch.unique(vectors, dim=0)
    if len(different) <= entries:
        return F.pad(different, (0, 0, 0, entries - len(different)))
    places = torch.arange(entries, device=vectors.device) * len(different) // entries
    centres = different[places]
    for _ in range(_ITERATIONS):
        codes = _nearest(vectors, centres)
        means, counts = _means(vectors, codes, entries)
        centres = torch.where(counts > 0, means, centres)
        idle = (counts == 0).flatten().nonzero().flatten()
        if len(idle):  # goes where the error is greatest
            errors = (vectors - centres[codes]).square().sum(1)
            centres[idle] = vectors[errors.argsort(descending=True, stable=True)[: len(idle)]]
    return centres


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """int64 [N]: the centre nearest to each vector."""
    halves = centres.square().sum(1) / 2  # |v - c|² / 2 = |v|² / 2 + |c|² / 2 - v · c
    at_once = rows_per_chunk(len(centres), vectors.device)
    return torch.cat(
        [
            _place_of_least(torch.addmm(halves, part, centres.T, alpha=-1))
            for part in vectors.split(at_once)
        ]
    )


def _place_of_least(scores: Tensor) -> Tensor:
    """The column of the least number of each row."""
    if scores.device.type != "cpu":
        return scores.argmin(1)
    # numpy's is several times faster than torch's
    places: Tensor = torch.from_numpy(scores.numpy().argmin(1))
    return places


def _means(vectors: Tensor, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """The mean [K, 4] of the vectors of each code (NaN for none), and how many there are [K, 1]."""
    sums = [torch.bincount(codes, axis.to(torch.float64), entries) for axis in vectors.unbind(1)]
    counts = torch.bincount(codes, minlength=entries).unsqueeze(1)
    return (torch.stack(sums, 1) / counts).to(torch.float32), counts
