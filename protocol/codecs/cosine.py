"""Quantisation of angles: the norm of a tensor, and the angle of each element in a few bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
    MAX_MAGNITUDE,
    check_magnitude,
    from_buffer,
    power_of_two_above,
    rows_per_chunk,
    to_buffer,
    to_device,
)
from protocol.errors import MalformedFrame

_HEADER = struct.Struct("<2d")  # norm, bound


class Cosine(FixedSizeCodec):
    """CosSGD: the angles θ = arccos(g / ‖g‖) of all elements, quantised evenly to S bits.

    The angles of all elements lie within a bound β of a right angle; sin β is the largest magnitude
    over the norm. With φ = π / 2 − θ = arcsin(g / ‖g‖) an element becomes the code round(m φ / β),
    from −m to m = 2^(S − 1) − 1, and decodes to ‖g‖ sin(code β / m). Only rounding errors make
    clipping necessary. Two differences from the paper: one code is unused, so that zero stays zero
    (most elements of many gradients are zero); φ and β replace θ, because θ has few significant
    digits near a right angle.

    The error of an element is at most ‖g‖ β / (2 m), which is at most π / (4 m) of the largest
    magnitude, plus float32's rounding of the norm. Random rounding chooses between the two
    neighbouring codes so that the expected value, not the expected angle, is right; the error is
    then at most twice as large. NaN, infinity and magnitudes above 2¹²⁵ are refused.

    Compression of float32: 32 / S for S = 2, 4 and 8, which are packed; else 4, one byte for each
    code. Norm and bound add 16 bytes.

    Source: arXiv 2012.08241.

    Args:
        bits: S, from 2 to 8.
        name: name with the parameter as written.
    """

    def __init__(self, bits: int, name: str) -> None:
        self.name = name
        self._bits = bits if bits in (2, 4) else 8  # bits of a packed code
        self._max_code = 2 ** (bits - 1) - 1  # m

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        plain = tensor.detach().reshape(-1).to(torch.float32)
        magnitude = check_magnitude(self.name, plain)
        unit = power_of_two_above(magnitude)
        scaled = plain / unit
        norm = _norm(scaled)
        bound = math.asin(min(1.0, magnitude / unit / norm)) if norm else 0.0
        codes = self._compute_codes(scaled, norm, bound, generator)
        codes = codes.add_(self._max_code).to(torch.uint8)
        header = bytearray(_HEADER.pack(norm * unit, bound))
        return [to_buffer(_pack(codes, self._bits)), memoryview(header)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        elements = math.prod(shape)
        return [-(-elements * self._bits // 8), _HEADER.size]

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        norm, bound = _HEADER.unpack(buffers[1])
        if not (0 <= bound <= math.pi / 2 and 0 <= norm * math.sin(bound) <= 2 * MAX_MAGNITUDE):
            raise MalformedFrame(
                "norm and bound must be those of a finite tensor",
                field="norm",
                limit=2 * MAX_MAGNITUDE,
                value=[norm, bound],
            )
        elements = math.prod(shape)
        packed = from_buffer(buffers[0], torch.uint8, buffers[0].nbytes)
        if unused := packed.numel() * 8 // self._bits - elements:
            _check_unused(int(packed[-1]), 8 - unused * self._bits)
        packed = to_device(packed, device)
        values = [norm * sine for sine in self._compute_sines(bound)]
        levels = torch.tensor(values, dtype=torch.float32, device=device)
        decoded = torch.empty(elements, dtype=torch.float32, device=device)
        chunk_codes = rows_per_chunk(1, decoded.device) // 8 * 8
        for out, part in zip(
            decoded.split(chunk_codes), packed.split(chunk_codes * self._bits // 8), strict=True
        ):
            codes = _unpack(part, self._bits)[: len(out)]
            if len(out) and int(codes.max()) >= len(levels):
                raise MalformedFrame(
                    "a code must be at most 2 m",
                    field="codes",
                    limit=len(levels) - 1,
                    value=int(codes.max()),
                )
            torch.index_select(levels, 0, codes.to(torch.int32), out=out)
        return decoded.reshape(tuple(shape))

    def _compute_codes(
        self, values: Tensor, norm: float, bound: float, generator: torch.Generator | None
    ) -> Tensor:
        """Return codes −m … m of values [n] with this norm; may overwrite ``values``."""
        if bound == 0:
            return torch.zeros_like(values)
        sines = values.mul_(1 / norm).clamp_(-1, 1)
        codes = torch.asin(sines).mul_(self._max_code / bound)
        if generator is None:
            return codes.round_().clamp_(-self._max_code, self._max_code)
        lower = codes.floor_().clamp_(-self._max_code, self._max_code - 1)
        levels = torch.tensor(self._compute_sines(bound), dtype=torch.float32, device=values.device)
        indices = (lower + self._max_code).to(torch.int64)
        below, above = levels[indices], levels[indices + 1]
        noise = torch.rand(values.shape, generator=generator, device=generator.device)
        return lower.add_(noise.to(values.device) * (above - below) < sines - below)

    def _compute_sines(self, bound: float) -> list[float]:
        """Return the sine of the angle of each code, from −m to m."""
        codes = range(-self._max_code, self._max_code + 1)
        return [math.sin(code * bound / self._max_code) for code in codes]


def _norm(values: Tensor) -> float:
    """Return the norm of float32 values of magnitudes up to 1, in double precision."""
    parts = values.split(rows_per_chunk(1, values.device))
    return math.sqrt(sum(float(part.to(torch.float64).square().sum()) for part in parts))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [n], 8 / bits in a byte, the first in its lowest bits."""
    if bits == 8:
        return codes
    codes_per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % codes_per_byte))
    columns = padded.view(-1, codes_per_byte)
    packed = columns[:, 0].clone()
    for index in range(1, codes_per_byte):
        packed |= columns[:, index] << (bits * index)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack bytes into codes: uint8 [bytes · 8 / bits]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts).bitwise_and_(2**bits - 1).flatten()


def _check_unused(byte: int, used: int) -> None:
    """Refuse a last byte with a bit set above the lowest ``used`` bits."""
    if byte >> used:
        raise MalformedFrame("unused bits must be zero", field="codes", limit=0, value=byte >> used)
