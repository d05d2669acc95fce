"""Transform coding: principal components of the tokens, one step for all, entropy coding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.arrays import NUMPY, Backend, Generator, chunks, widen
from protocol.codecs.codec import Codec
from protocol.codecs.memory import (
    BFLOAT16_BYTES,
    MIN_SCALE,
    check_magnitude,
    find_extremes,
    from_buffer,
    is_within,
    power_of_two_above,
    rows_per_chunk,
    to_buffer,
)
from protocol.codecs.rans import (
    MAX_REACH,
    TABLE_BYTES,
    decode_columns,
    encode_columns,
    fit_tables,
    lookup_bytes,
    reaches,
)
from protocol.errors import MalformedFrame
from protocol.wire import FLOAT32_BYTES

_WORD_BYTES = 2

_CODE_BYTES = 10  # bytes of a code during decoding: as int16, int32 and float32

_MAX_VALUE = 2.0**126  # largest decoded value, so that all of them are finite

_MIN_SAMPLES = 4  # from this number on, the codes of each position's mean are sent once

_FINE_SAMPLES = 32  # from this number on, the means are sent in quarters of a step

_MIN_VARIANCE = 0.18  # squared steps: components with less variance do not pay for their codes

_MIN_OFFSET_VARIANCE = 0.05  # the same for the means of the positions, which are sent once

_BASIS_WEIGHT = 0.25  # the same for the bytes of a direction, times width / tokens

_MAX_CODE = 16_000  # largest code of the matrix, below the limit of `rans`

Reaches = NDArray[np.int64]


@dataclass(frozen=True)
class _Layout:
    """A tensor as [samples, positions, width]."""

    samples: int
    positions: int
    width: int

    @property
    def tokens(self) -> int:
        return self.samples * self.positions

    @property
    def max_rank(self) -> int:
        return min(self.width, self.tokens)

    @property
    def fraction(self) -> int:
        """The number of codes in one step of a position's mean."""
        return 4 if self.samples >= _FINE_SAMPLES else 1

    @property
    def predicted(self) -> int:
        """The number of rows with codes of the positions' means, which precede the tokens' rows."""
        return self.positions if self.samples >= _MIN_SAMPLES and self.positions > 1 else 0


class Klt(Codec):
    """Codes of the tokens' principal components, all with the same step Q σ.

    A tensor of two or more dimensions is [samples, positions, width] (the dimensions between the
    first and the last are one); a token is a row of it. σ is the standard deviation about the
    means of the positions. The components of all tokens are rounded to multiples of the step.
    Components far below the step become zero and cost almost no bytes (reverse water-filling). From
    4 samples on, the codes of each position's mean are sent once, and the codes of a token are
    relative to them. The mean token and the directions of the components are rounded and sent too:
    4 to 30 KB at a width of 384. All codes are entropy-coded (`rans`).

    The error of a sent component is at most half a step; other components are lost. It never rounds
    at random and ignores a generator. NaN, infinity and magnitudes above 2¹²⁵ are refused. The
    tensor is sent as plain float32 if this saves bytes, or with fewer than two dimensions. The
    bytes of each sample decrease with the number of samples.

    Args:
        step: Q, the step in standard deviations.
        name: name with the parameter as written.
    """

    def __init__(self, step: float, name: str) -> None:
        self.name, self._step = name, step

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        plain = backend.xp.astype(array, backend.xp.float32, copy=False)
        scale = power_of_two_above(check_magnitude(self.name, backend, plain))
        layout = _layout(plain.shape)
        if layout is not None:
            tokens = backend.contiguous(plain.reshape(layout.tokens, layout.width))
            buffers = _encode_tokens(backend, tokens, layout, self._step, scale)
            plain_bytes = FLOAT32_BYTES * layout.tokens * layout.width
            if buffers and sum(buffer.nbytes for buffer in buffers) < plain_bytes:
                return buffers
        return [to_buffer(backend.host(plain))]

    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        layout, plain = _layout(shape), FLOAT32_BYTES * math.prod(shape)
        if count == 1:
            return [plain]
        if count != 3 or layout is None:
            raise self._wrong_sizes(shape, [count])
        steps, tables = _header_sizes(layout.max_rank)
        return [steps, tables, plain]

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        limits = self.max_sizes(shape, len(sizes))
        if len(sizes) == 1:
            if list(sizes) != limits:
                raise self._wrong_sizes(shape, list(sizes))
            return
        rank = sizes[0] // BFLOAT16_BYTES - 1
        if (
            rank < 0
            or any(not 0 <= size <= limit for size, limit in zip(sizes, limits, strict=True))
            or (sizes[0], sizes[1]) != _header_sizes(rank)
            or sizes[2] % _WORD_BYTES
            or sum(sizes) >= FLOAT32_BYTES * math.prod(shape)
        ):
            raise self._wrong_sizes(shape, list(sizes))

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the bytes of the tensor, of both matrices' codes, and of their lookup tables."""
        plain = super().decoded_bytes(shape, sizes)
        layout = _layout(shape)
        if len(sizes) == 1 or layout is None:
            return plain
        columns = sizes[0] // BFLOAT16_BYTES
        rows = layout.width + layout.predicted + layout.tokens
        return plain + _CODE_BYTES * columns * rows + lookup_bytes(rows, columns)

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        layout = _layout(shape)
        if len(buffers) == 1 or layout is None:
            return backend.own(from_buffer(buffers[0], "<f4", *shape))
        columns = buffers[0].nbytes // BFLOAT16_BYTES
        steps = widen(from_buffer(buffers[0], "<i2", columns))
        matrix_tables = buffers[1][: TABLE_BYTES * columns]
        code_tables = buffers[1][TABLE_BYTES * columns :]
        _check_values(steps, reaches(matrix_tables), reaches(code_tables))
        words = np.frombuffer(buffers[2], "<u2")
        matrix, used = decode_columns(words, layout.width, matrix_tables)  # [width, 1 + rank]
        rows = layout.predicted + layout.tokens
        codes, last = decode_columns(words[used:], rows, code_tables)  # [rows, rank]
        if used + last != len(words):
            raise MalformedFrame(
                "words follow the last code",
                field="words",
                limit=used + last,
                value=len(words),
            )
        scaled = backend.own(matrix * steps)
        own = backend.own(codes.astype(np.int32))
        if layout.predicted:
            samples = own[layout.predicted :].reshape(layout.samples, layout.positions, -1)
            own = (layout.fraction * samples + own[: layout.predicted]).reshape(layout.tokens, -1)
            scaled[:, 1:] /= layout.fraction
        decoded = backend.empty(layout.tokens, layout.width)
        for out, part in chunks(rows_per_chunk(layout.width, backend), decoded, own):
            numbers = backend.xp.astype(part, backend.xp.float32)
            backend.add_product(scaled[:, 0], numbers, scaled[:, 1:].T, out=out)
        return decoded.reshape(tuple(shape))

    def _wrong_sizes(self, shape: Sequence[int], sizes: list[int]) -> MalformedFrame:
        return MalformedFrame(
            f"a {self.name} tensor of shape {list(shape)} needs one float32 buffer, or three "
            "buffers of one rank with fewer bytes in all",
            field="sizes",
            limit=FLOAT32_BYTES * math.prod(shape),
            value=sizes,
        )


def _layout(shape: Sequence[int]) -> _Layout | None:
    """Return the layout of a shape; None if it is always sent as plain float32."""
    elements = math.prod(shape)
    if len(shape) < 2 or elements == 0:
        return None
    return _Layout(shape[0], elements // (shape[0] * shape[-1]), shape[-1])


def _header_sizes(rank: int) -> tuple[int, int]:
    """Return the bytes of the steps and of the tables: the mean token, then the directions."""
    return BFLOAT16_BYTES * (1 + rank), TABLE_BYTES * (1 + 2 * rank)


def _check_values(steps: NDArray[np.float32], matrix_reach: Reaches, code_reach: Reaches) -> None:
    """Refuse negative steps, and steps with which a value could be too large.

    Raises:
        MalformedFrame: a step is negative or too large.
    """
    if not is_within(steps, 0.0, _MAX_VALUE):
        raise MalformedFrame(
            "a step must be from 0 to this limit",
            field="steps",
            limit=_MAX_VALUE,
            value=find_extremes(steps),
        )
    largest = steps.astype(np.float64) * matrix_reach
    value = float(largest[0] + (2 * largest[1:] * code_reach).sum())
    if not value <= _MAX_VALUE:
        raise MalformedFrame(
            "steps and reaches allow values above this limit",
            field="steps",
            limit=_MAX_VALUE,
            value=value,
        )


@dataclass(frozen=True)
class _Transform:
    """The rounded transform that is sent with the codes.

    Attributes:
        matrix: codes of the mean token and of the directions, [width, 1 + rank], float64.
        steps: step of each column, [1 + rank], float32 with the precision of bfloat16. The step of
            a direction includes the step of the tokens' codes.
    """

    matrix: Any
    steps: Any

    def project(self, backend: Backend, tokens: Any, scale: float) -> Any:
        """Return the least-squares coordinates [rows, rank] of tokens, in steps."""
        xp = backend.xp
        scaled = self.matrix * xp.astype(self.steps, xp.float64)
        directions = scaled[:, 1:]
        inverse = xp.linalg.solve(directions.T @ directions, directions.T)  # [rank, width]
        offset = xp.astype(inverse @ scaled[:, 0], xp.float32)
        inverse = xp.astype(inverse, xp.float32)
        parts = chunks(rows_per_chunk(tokens.shape[1], backend), tokens)
        return xp.concat([(part / scale) @ inverse.T - offset for (part,) in parts])


def _encode_tokens(
    backend: Backend, tokens: Any, layout: _Layout, relative_step: float, scale: float
) -> list[memoryview] | None:
    """Encode tokens; None: this form cannot represent them.

    Args:
        backend: of the tokens.
        tokens: the tokens, contiguous, [tokens, width].
        layout: layout of the tensor.
        relative_step: Q, the step in standard deviations.
        scale: a power of two above all magnitudes, by which the tokens are divided.
    """
    xp = backend.xp
    try:
        transform = _fit_transform(backend, tokens, layout, relative_step, scale)
        coordinates = transform.project(backend, tokens, scale)
    except backend.linalg_error:  # no convergence, or singular
        return None
    steps = backend.host(transform.steps * scale)
    if not bool(xp.all(xp.isfinite(coordinates))) or not is_within(steps, 0.0, _MAX_VALUE):
        return None
    if layout.predicted:
        by_sample = coordinates.reshape(layout.samples, layout.positions, -1)
        means = xp.round(xp.mean(by_sample, axis=0) * layout.fraction)
        by_sample -= means / layout.fraction
        coordinates = xp.concat([means, coordinates])
    codes = xp.astype(xp.round(coordinates, out=coordinates), xp.int32)
    parts = [backend.host(part) for part in (xp.astype(transform.matrix, xp.int32), codes)]
    tables = [table for table in map(fit_tables, parts) if table is not None]
    if len(tables) < len(parts):  # a code is too large
        return None
    words = [encode_columns(part, table) for part, table in zip(parts, tables, strict=True)]
    steps[steps < MIN_SCALE] = 0.0
    return [
        to_buffer(NUMPY.to_bfloat16(steps)),
        memoryview(b"".join(tables)),
        memoryview(b"".join(part.tobytes() for part in words)),
    ]


def _fit_transform(
    backend: Backend, tokens: Any, layout: _Layout, relative_step: float, scale: float
) -> _Transform:
    """Choose the step, the directions and their precision.

    Raises:
        Exception: the backend's `linalg_error`: the eigenvalues do not converge.
    """
    xp = backend.xp
    mean, offsets, scatter = _moments(backend, tokens, layout, scale)
    total = float(xp.linalg.trace(scatter))
    within = total - layout.samples * float(xp.sum(offsets**2))
    freedom = (layout.samples - 1) * layout.positions * layout.width
    if layout.samples == 1 or within <= 1e-12 * total:  # one sample, or all of them are equal
        within, freedom = total, layout.tokens * layout.width
    step = relative_step * math.sqrt(within / freedom)
    directions = _choose_directions(xp, offsets, scatter, layout, step**2)
    rank = directions.shape[1]
    deviations = (xp.sum((scatter @ directions) * directions, axis=0) / layout.tokens) ** 0.5
    precision = min(max(math.sqrt(rank / layout.tokens), 0.1), 1.0)
    units = precision * step / (deviations * math.sqrt(max(rank, 1)))  # steps of the directions
    units = backend.clip(units, 1 / _MAX_CODE, 1 / math.sqrt(layout.width))
    first = xp.empty_like(mean[:1])
    first[...] = max(step / 4, float(xp.max(xp.abs(mean))) / _MAX_CODE)
    steps = xp.astype(xp.concat([first, step * units]), xp.float32)
    steps = widen(backend.to_bfloat16(steps), backend)
    divisors = xp.astype(steps, xp.float64)
    divisors[divisors == 0] = math.inf  # x / inf gives code 0
    columns = xp.concat([mean[:, None], step * directions], axis=1)
    matrix = backend.clip(xp.round(columns / divisors), -MAX_REACH, MAX_REACH)
    return _Transform(matrix, steps)


def _choose_directions(
    xp: Any, offsets: Any, scatter: Any, layout: _Layout, squared_step: float
) -> Any:
    """Return orthonormal directions [width, rank] that are worth their bytes.

    If the positions' means are coded, these are the principal components about them, and then those
    of the means' remainder.

    Raises:
        Exception: the backend's `linalg_error`: the eigenvalues do not converge.
    """
    if not squared_step:
        return scatter[:, :0]
    basis_cost = _BASIS_WEIGHT * layout.width / layout.tokens
    if not layout.predicted:
        return _principal(xp, scatter / layout.tokens, squared_step * (_MIN_VARIANCE + basis_cost))
    within = (scatter - layout.samples * (offsets.T @ offsets)) / layout.tokens
    directions = _principal(xp, within, squared_step * (_MIN_VARIANCE + basis_cost))
    rest = offsets - (offsets @ directions) @ directions.T
    between = rest.T @ rest / layout.positions
    extra = _principal(xp, between, squared_step * (_MIN_OFFSET_VARIANCE + basis_cost))
    return xp.concat([directions, extra], axis=1)[:, : layout.max_rank]


def _principal(xp: Any, covariance: Any, threshold: float) -> Any:
    """Return the principal directions with variances above a threshold, the largest first."""
    variances, vectors = xp.linalg.eigh(covariance)
    rank = int(xp.sum(variances > threshold))
    return xp.flip(vectors[:, len(variances) - rank :], axis=1)


def _moments(backend: Backend, tokens: Any, layout: _Layout, scale: float) -> tuple[Any, Any, Any]:
    """Return the mean token, the positions' offsets from it, and the tokens' scatter about it.

    All are of the tokens divided by ``scale``, in float64: [width], [positions, width] and
    [width, width].
    """
    xp = backend.xp
    by_sample = tokens.reshape(layout.samples, layout.positions, layout.width)
    chunk_rows = rows_per_chunk(layout.width, backend)
    total: Any = 0.0
    for (part,) in chunks(max(1, chunk_rows // layout.positions), by_sample):
        total = total + xp.sum(xp.astype(part, xp.float64) / scale, axis=0)
    means = total / layout.samples
    mean = xp.mean(means, axis=0)
    scatter: Any = 0.0
    for (part,) in chunks(chunk_rows, tokens):
        offset = xp.astype(part, xp.float64) / scale - mean
        scatter = scatter + offset.T @ offset
    return mean, means - mean, scatter
