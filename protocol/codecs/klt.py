"""Transform coding: principal components of the tokens, one step for all, entropy coding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.codecs.codec import Codec, Device
from protocol.codecs.memory import (
    MIN_SCALE,
    check_magnitude,
    find_extremes,
    from_buffer,
    is_within,
    power_of_two_above,
    rows_per_chunk,
    to_buffer,
    to_device,
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

_STEP_BYTES = torch.bfloat16.itemsize

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

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        plain = tensor.detach().to(torch.float32)
        magnitude = check_magnitude(self.name, plain)
        layout = _layout(plain.shape)
        if layout is not None:
            tokens = plain.reshape(layout.tokens, layout.width).contiguous()
            buffers = _encode_tokens(tokens, layout, self._step, power_of_two_above(magnitude))
            if buffers and sum(buffer.nbytes for buffer in buffers) < FLOAT32_BYTES * plain.numel():
                return buffers
        return [to_buffer(plain)]

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
        rank = sizes[0] // _STEP_BYTES - 1
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
        columns = sizes[0] // _STEP_BYTES
        rows = layout.width + layout.predicted + layout.tokens
        return plain + _CODE_BYTES * columns * rows + lookup_bytes(rows, columns)

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        layout = _layout(shape)
        if len(buffers) == 1 or layout is None:
            return to_device(from_buffer(buffers[0], torch.float32, *shape), device)
        columns = buffers[0].nbytes // _STEP_BYTES
        steps = from_buffer(buffers[0], torch.bfloat16, columns).to(torch.float32)
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
        scaled = to_device(torch.from_numpy(matrix), device) * to_device(steps, device)
        own = to_device(torch.from_numpy(codes.astype(np.int32)), device)
        if layout.predicted:
            samples = own[layout.predicted :].reshape(layout.samples, layout.positions, -1)
            own = (layout.fraction * samples + own[: layout.predicted]).flatten(0, 1)
            scaled[:, 1:] /= layout.fraction
        decoded = torch.empty(layout.tokens, layout.width, dtype=torch.float32, device=device)
        chunk_rows = rows_per_chunk(layout.width, decoded.device)
        for out, part in zip(decoded.split(chunk_rows), own.split(chunk_rows), strict=True):
            torch.addmm(scaled[:, 0], part.to(torch.float32), scaled[:, 1:].T, out=out)
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
    return _STEP_BYTES * (1 + rank), TABLE_BYTES * (1 + 2 * rank)


def _check_values(steps: Tensor, matrix_reach: Reaches, code_reach: Reaches) -> None:
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
    largest = steps.to(torch.float64).numpy() * matrix_reach
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
        steps: step of each column, [1 + rank], bfloat16. The step of a direction includes the step
            of the tokens' codes.
    """

    matrix: Tensor
    steps: Tensor

    def project(self, tokens: Tensor, scale: float) -> Tensor:
        """Return the least-squares coordinates [rows, rank] of tokens, in steps."""
        scaled = self.matrix * self.steps.to(torch.float64)
        directions = scaled[:, 1:]
        inverse = torch.linalg.solve(directions.T @ directions, directions.T)  # [rank, width]
        offset = inverse @ scaled[:, 0]
        inverse, offset = inverse.to(torch.float32), offset.to(torch.float32)
        chunks = tokens.split(rows_per_chunk(tokens.shape[1], tokens.device))
        return torch.cat([(chunk / scale) @ inverse.T - offset for chunk in chunks])


def _encode_tokens(
    tokens: Tensor, layout: _Layout, relative_step: float, scale: float
) -> list[memoryview] | None:
    """Encode tokens; None: this form cannot represent them.

    Args:
        tokens: the tokens, contiguous, [tokens, width].
        layout: layout of the tensor.
        relative_step: Q, the step in standard deviations.
        scale: a power of two above all magnitudes, by which the tokens are divided.
    """
    try:
        transform = _fit_transform(tokens, layout, relative_step, scale)
        coordinates = transform.project(tokens, scale)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # no convergence, or singular
        return None
    steps = transform.steps.to(torch.float32) * scale
    if not bool(coordinates.isfinite().all()) or not is_within(steps.cpu(), 0.0, _MAX_VALUE):
        return None
    if layout.predicted:
        by_sample = coordinates.reshape(layout.samples, layout.positions, -1)
        means = (by_sample.mean(dim=0) * layout.fraction).round_()
        by_sample -= means / layout.fraction
        coordinates = torch.cat([means, coordinates])
    codes = coordinates.round_().to(torch.int32)
    parts = [part.cpu().numpy() for part in (transform.matrix.to(torch.int32), codes)]
    tables = [table for table in map(fit_tables, parts) if table is not None]
    if len(tables) < len(parts):  # a code is too large
        return None
    words = [encode_columns(part, table) for part, table in zip(parts, tables, strict=True)]
    steps.masked_fill_(steps < MIN_SCALE, 0.0)
    return [
        to_buffer(steps.to(torch.bfloat16)),
        memoryview(b"".join(tables)),
        memoryview(b"".join(part.tobytes() for part in words)),
    ]


def _fit_transform(
    tokens: Tensor, layout: _Layout, relative_step: float, scale: float
) -> _Transform:
    """Choose the step, the directions and their precision.

    Raises:
        torch.linalg.LinAlgError: the eigenvalues do not converge.
    """
    mean, offsets, scatter = _moments(tokens, layout, scale)
    total = float(scatter.trace())
    within = total - layout.samples * float(offsets.square().sum())
    freedom = (layout.samples - 1) * layout.positions * layout.width
    if layout.samples == 1 or within <= 1e-12 * total:  # one sample, or all of them are equal
        within, freedom = total, layout.tokens * layout.width
    step = relative_step * math.sqrt(within / freedom)
    directions = _choose_directions(offsets, scatter, layout, step**2)
    rank = directions.shape[1]
    deviations = ((scatter @ directions) * directions).sum(dim=0).div_(layout.tokens).sqrt_()
    precision = min(max(math.sqrt(rank / layout.tokens), 0.1), 1.0)
    units = precision * step / (deviations * math.sqrt(max(rank, 1)))  # steps of the directions
    units.clamp_(1 / _MAX_CODE, 1 / math.sqrt(layout.width))
    mean_step = max(step / 4, float(mean.abs().max()) / _MAX_CODE)
    first = torch.tensor([mean_step], dtype=torch.float64, device=mean.device)
    steps = torch.cat([first, step * units]).to(torch.bfloat16)
    columns = torch.cat([mean[:, None], step * directions], dim=1)
    divisors = steps.to(torch.float64)
    divisors.masked_fill_(divisors == 0, math.inf)  # x / inf gives code 0
    matrix = (columns / divisors).round_().clamp_(-MAX_REACH, MAX_REACH)
    return _Transform(matrix, steps)


def _choose_directions(
    offsets: Tensor, scatter: Tensor, layout: _Layout, squared_step: float
) -> Tensor:
    """Return orthonormal directions [width, rank] that are worth their bytes.

    If the positions' means are coded, these are the principal components about them, and then those
    of the means' remainder.

    Raises:
        torch.linalg.LinAlgError: the eigenvalues do not converge.
    """
    if not squared_step:
        return scatter[:, :0]
    basis_cost = _BASIS_WEIGHT * layout.width / layout.tokens
    if not layout.predicted:
        return _principal(scatter / layout.tokens, squared_step * (_MIN_VARIANCE + basis_cost))
    within = (scatter - layout.samples * (offsets.T @ offsets)) / layout.tokens
    directions = _principal(within, squared_step * (_MIN_VARIANCE + basis_cost))
    rest = offsets - (offsets @ directions) @ directions.T
    between = rest.T @ rest / layout.positions
    extra = _principal(between, squared_step * (_MIN_OFFSET_VARIANCE + basis_cost))
    return torch.cat([directions, extra], dim=1)[:, : layout.max_rank]


def _principal(covariance: Tensor, threshold: float) -> Tensor:
    """Return the principal directions with variances above a threshold, the largest first."""
    variances, vectors = torch.linalg.eigh(covariance)
    rank = int((variances > threshold).sum())
    largest: Tensor = vectors[:, len(variances) - rank :]
    return largest.flip(1)


def _moments(tokens: Tensor, layout: _Layout, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean token, the positions' offsets from it, and the tokens' scatter about it.

    All are of the tokens divided by ``scale``, in float64: [width], [positions, width] and
    [width, width].
    """
    by_sample = tokens.reshape(layout.samples, layout.positions, layout.width)
    per_chunk = max(1, rows_per_chunk(layout.width, tokens.device) // layout.positions)
    total = torch.zeros(layout.positions, layout.width, dtype=torch.float64, device=tokens.device)
    for chunk in by_sample.split(per_chunk):
        total += (chunk.to(torch.float64) / scale).sum(dim=0)
    means = total / layout.samples
    mean = means.mean(dim=0)
    scatter = torch.zeros(layout.width, layout.width, dtype=torch.float64, device=tokens.device)
    for chunk in tokens.split(rows_per_chunk(layout.width, tokens.device)):
        offset = chunk.to(torch.float64) / scale - mean
        scatter.addmm_(offset.T, offset)
    return mean, means - mean, scatter
