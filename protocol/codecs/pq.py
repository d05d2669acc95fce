"""Product quantisation: runs of four numbers become indices into a codebook sent with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from protocol.arrays import Backend, Generator, chunks
from protocol.codecs.codec import FixedSizeCodec
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

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        xp = backend.xp
        plain = xp.astype(to_matrix(backend, array), xp.float32, copy=False)
        unit = power_of_two_above(check_magnitude(self.name, backend, plain))
        rows, vectors = _vector_shape(array.shape)
        padded = backend.empty(rows, vectors * _VECTOR_SIZE)
        padded[...] = 0.0
        padded[:, : plain.shape[1]] = plain
        padded /= unit
        codes, codebook = _cluster(backend, padded.reshape(-1, _VECTOR_SIZE))
        return [to_buffer(backend.host(part)) for part in (codes, codebook * unit)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        vectors = math.prod(_vector_shape(shape))
        return [vectors, min(vectors, _MAX_ENTRIES) * _VECTOR_SIZE * FLOAT32_BYTES]

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the bytes of the tensor twice, since rows are padded, and of 64-bit codes."""
        codes, _ = sizes
        return 2 * super().decoded_bytes(shape, sizes) + 8 * codes

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        rows, width = matrix_shape(shape)
        code_shape = _vector_shape(shape)
        entries = min(math.prod(code_shape), _MAX_ENTRIES)
        codes = from_buffer(buffers[0], "u1", *code_shape)
        codebook = from_buffer(buffers[1], "<f4", entries, _VECTOR_SIZE)
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
        xp = backend.xp
        codebook = backend.own(codebook)
        decoded = backend.empty(rows, width)
        for out, part in chunks(rows_per_chunk(width, backend), decoded, backend.own(codes)):
            vectors = xp.take(codebook, xp.astype(part.reshape(-1), xp.int64), axis=0)
            out[...] = vectors.reshape(len(part), code_shape[1] * _VECTOR_SIZE)[:, :width]
        return decoded.reshape(tuple(shape))


def _vector_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of rows, and of vectors in each row."""
    rows, width = matrix_shape(shape)
    return rows, -(-width // _VECTOR_SIZE)


def _cluster(backend: Backend, vectors: Any) -> tuple[Any, Any]:
    """Cluster vectors [N, 4] of magnitudes up to 1: uint8 codes [N] and codebook [K, 4]."""
    xp = backend.xp
    entries = min(len(vectors), _MAX_ENTRIES)
    if entries == 0:
        return xp.empty_like(vectors[:, 0], dtype=xp.uint8), vectors
    centres = _fit(backend, _subsample(xp, vectors), entries)
    codes = _assign(backend, vectors, centres)
    means, counts = _compute_means(backend, vectors, codes, entries)
    means[counts == 0] = 0.0
    return xp.astype(codes, xp.uint8), means


def _subsample(xp: Any, vectors: Any) -> Any:
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
    return vectors[xp.arange(_MAX_FITTED, dtype=xp.int64, device=vectors.device) * step % count]


def _fit(backend: Backend, vectors: Any, entries: int) -> Any:
    """Run Lloyd's algorithm, initialised with distinct vectors in sorted order."""
    xp = backend.xp
    distinct = _distinct(xp, vectors)
    if len(distinct) <= entries:
        return xp.concat([distinct, xp.zeros_like(vectors[: entries - len(distinct)])])
    places = xp.arange(entries, dtype=xp.int64, device=vectors.device) * len(distinct) // entries
    centres = distinct[places]
    for _ in range(_ITERATIONS):
        codes = _assign(backend, vectors, centres)
        means, counts = _compute_means(backend, vectors, codes, entries)
        centres = xp.where(counts[:, None] > 0, means, centres)
        (unused,) = xp.nonzero(counts == 0)
        if len(unused):  # move these centres to the vectors with the largest errors
            errors = xp.sum((vectors - centres[codes]) ** 2, axis=1)
            largest = xp.argsort(errors, descending=True, stable=True)
            centres[unused] = vectors[largest[: len(unused)]]
    return centres


def _distinct(xp: Any, vectors: Any) -> Any:
    """Return the vectors [N, 4] that differ, sorted by their first number, then the second, …"""
    ordered = vectors
    for axis in reversed(range(_VECTOR_SIZE)):
        ordered = ordered[xp.argsort(ordered[:, axis], stable=True)]
    differs = xp.any(ordered[1:] != ordered[:-1], axis=1)
    return xp.concat([ordered[:1], ordered[1:][differs]])


def _assign(backend: Backend, vectors: Any, centres: Any) -> Any:
    """Return the index of the nearest centre of each vector: int64 [N]."""
    xp = backend.xp
    halves = xp.sum(centres**2, axis=1) / 2  # |v - c|² / 2 = |v|² / 2 + |c|² / 2 - v · c
    scores = backend.empty(rows_per_chunk(len(centres), backend), len(centres))
    return xp.concat(
        [
            backend.argmin(
                backend.add_product(halves, part, centres.T, out=scores[: len(part)], sign=-1)
            )
            for (part,) in chunks(len(scores), vectors)
        ]
    )


def _compute_means(backend: Backend, vectors: Any, codes: Any, entries: int) -> tuple[Any, Any]:
    """Return the mean [K, 4] of the vectors of each code (NaN if none) and their number [K]."""
    xp = backend.xp
    sums = [
        backend.bincount(codes, xp.astype(vectors[:, axis], xp.float64), entries)
        for axis in range(_VECTOR_SIZE)
    ]
    counts = backend.bincount(codes, None, entries)
    return xp.astype(xp.stack(sums, axis=1) / counts[:, None], xp.float32), counts
