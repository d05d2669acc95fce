"""Product quantisation: runs of four numbers become indices into a codebook sent with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
    MAX_MAGNITUDE,
    check_magnitude,
    find_extremes,
    from_buffer,
    is_within,
    matrix_shape,
    power_of_two_above,
    rows_per_chunk,
    to_buffer,
    to_device,
    to_matrix,
)
from protocol.errors import MalformedFrame
from protocol.wire import FLOAT32_BYTES

_VECTOR_SIZE = 4  # numbers that share one index

_MAX_ENTRIES = 256  # entries of a codebook: the values of a byte

_ITERATIONS = 8

_MAX_FITTED = 16_384  # vectors that the codebook is fitted to


class ProductQuantiser(FixedSizeCodec):
    """One byte for every four neighbours in a row of the last dimension.

    One codebook for all positions: k-means with 256 centres clusters the vectors of four numbers (a
    row's last vector is padded with zeros). The centres are fitted to at most 16 384 evenly spread
    vectors; at the end each becomes the mean of all vectors assigned to it. Nothing is random.

    There is no bound for a single element. Over the tensor, the squared error is at most the sum
    of squared distances of its vectors from their mean, and so at most the tensor's squared norm.
    A tensor with at most 256 different vectors among at most 16 384 is exact up to rounding. For
    Gaussian numbers the relative error is near 0.3.

    It never rounds at random and ignores a generator. NaN, infinity and magnitudes above 2¹²⁵ are
    refused.

    Compression of float32: near 16. A row of D numbers has ⌈D / 4⌉ bytes, the codebook 16 bytes for
    each entry: 256 entries, or one for each vector if there are fewer.

    Source: FedLite, arXiv 2201.11865.
    """

    name = "pq"

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        plain = to_matrix(tensor).to(torch.float32)
        magnitude = check_magnitude(self.name, plain)
        unit = power_of_two_above(magnitude)
        vectors = F.pad(plain / unit, (0, -plain.shape[1] % _VECTOR_SIZE)).view(-1, _VECTOR_SIZE)
        codes, codebook = _cluster(vectors)
        return [to_buffer(codes), to_buffer(codebook * unit)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        vectors = math.prod(_vector_shape(shape))
        return [vectors, min(vectors, _MAX_ENTRIES) * _VECTOR_SIZE * FLOAT32_BYTES]

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the bytes of the tensor twice, since rows are padded, and of 64-bit codes."""
        codes, _ = sizes
        return 2 * super().decoded_bytes(shape, sizes) + 8 * codes

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        rows, width = matrix_shape(shape)
        code_shape = _vector_shape(shape)
        entries = min(math.prod(code_shape), _MAX_ENTRIES)
        codes = from_buffer(buffers[0], torch.uint8, *code_shape)
        codebook = from_buffer(buffers[1], torch.float32, entries, _VECTOR_SIZE)
        if entries and int(codes.max()) >= entries:
            raise MalformedFrame(
                "a code must be below the number of codebook entries",
                field="codes",
                limit=entries - 1,
                value=int(codes.max()),
            )
        if not is_within(codebook, -2 * MAX_MAGNITUDE, 2 * MAX_MAGNITUDE):
            raise MalformedFrame(
                "a number in the codebook is beyond this magnitude, or NaN",
                field="codebook",
                limit=2 * MAX_MAGNITUDE,
                value=find_extremes(codebook),
            )
        codes, codebook = to_device(codes, device), to_device(codebook, device)
        decoded = torch.empty(rows, width, dtype=torch.float32, device=device)
        chunk_rows = rows_per_chunk(width, decoded.device)
        for out, part in zip(decoded.split(chunk_rows), codes.split(chunk_rows), strict=True):
            out.copy_(F.embedding(part.to(torch.int64), codebook).flatten(1)[:, :width])
        return decoded.reshape(tuple(shape))


def _vector_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of rows, and of vectors in each row."""
    rows, width = matrix_shape(shape)
    return rows, -(-width // _VECTOR_SIZE)


def _cluster(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster vectors [N, 4] of magnitudes up to 1: uint8 codes [N] and codebook [K, 4]."""
    entries = min(len(vectors), _MAX_ENTRIES)
    if entries == 0:
        return vectors.new_empty(0, dtype=torch.uint8), vectors
    centres = _fit(_subsample(vectors), entries)
    codes = _assign(vectors, centres)
    means, counts = _compute_means(vectors, codes, entries)
    return codes.to(torch.uint8), torch.where(counts > 0, means, 0.0)


def _subsample(vectors: Tensor) -> Tensor:
    """Choose at most `_MAX_FITTED` vectors, evenly spread even if the tensor is periodic.

    The step has no common factor with the number of vectors, so that no vector is chosen twice and
    each position in a row is chosen equally often. It is near the golden ratio of the number, so
    that the chosen vectors are evenly spread.
    """
    count = len(vectors)
    if count <= _MAX_FITTED:
        return vectors
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) > 1:
        step += 1
    indices = torch.arange(_MAX_FITTED, dtype=torch.int64, device=vectors.device) * step % count
    return vectors[indices]


def _fit(vectors: Tensor, entries: int) -> Tensor:
    """Run Lloyd's algorithm, initialised with distinct vectors in sorted order."""
    distinct: Tensor = torch.unique(vectors, dim=0)
    if len(distinct) <= entries:
        return F.pad(distinct, (0, 0, 0, entries - len(distinct)))
    indices = torch.arange(entries, device=vectors.device) * len(distinct) // entries
    centres = distinct[indices]
    for _ in range(_ITERATIONS):
        codes = _assign(vectors, centres)
        means, counts = _compute_means(vectors, codes, entries)
        centres = torch.where(counts > 0, means, centres)
        unused = (counts == 0).flatten().nonzero().flatten()
        if len(unused):  # move these centres to the vectors with the largest errors
            errors = (vectors - centres[codes]).square().sum(1)
            centres[unused] = vectors[errors.argsort(descending=True, stable=True)[: len(unused)]]
    return centres


def _assign(vectors: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the nearest centre of each vector: int64 [N]."""
    halves = centres.square().sum(1) / 2  # |v - c|² / 2 = |v|² / 2 + |c|² / 2 - v · c
    chunk_rows = rows_per_chunk(len(centres), vectors.device)
    return torch.cat(
        [
            _argmin(torch.addmm(halves, part, centres.T, alpha=-1))
            for part in vectors.split(chunk_rows)
        ]
    )


def _argmin(scores: Tensor) -> Tensor:
    """Return the column of the least number of each row."""
    if scores.device.type != "cpu":
        return scores.argmin(1)
    # numpy's argmin is several times faster on the CPU than torch's.
    columns: Tensor = torch.from_numpy(scores.numpy().argmin(1))
    return columns


def _compute_means(vectors: Tensor, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return the mean [K, 4] of the vectors of each code (NaN if none) and their number [K, 1]."""
    sums = [torch.bincount(codes, axis.to(torch.float64), entries) for axis in vectors.unbind(1)]
    counts = torch.bincount(codes, minlength=entries).unsqueeze(1)
    return (torch.stack(sums, 1) / counts).to(torch.float32), counts
