"""A tensor as one vector: its norm, and the angle of each element in a few bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
    from_buffer,
    max_magnitude,
    power_of_two_above,
    range_error,
    rows_per_chunk,
    to_buffer,
    to_device,
)
from protocol.errors import MalformedFrame

_HEADER = struct.Struct("<2d")  # norm, bound

_LARGEST = 2.0**125


class Cosine(FixedSizeCodec):
    """CosSGD (arXiv 2012.08241): angles θ = arccos(g / ‖g‖), quantised evenly to S bits.

    The angles of all elements lie within a bound β of a right angle, where sin β is the largest
    magnitude over the norm; with φ = π / 2 − θ = arcsin(g / ‖g‖) an element becomes the code
    round(m φ / β), from −m to m = 2^(S − 1) − 1, and comes back as ‖g‖ sin(code β / m). Angles are
    clipped to the bound only by rounding errors. Two departures from the paper: one code is left
    out, so that zero stays zero (many gradients are zero in most places), and φ and β are used in
    place of θ, because near a right angle θ has few digits left.

    Every element comes back within ‖g‖ β / (2 m), which is at most π / (4 m) of the largest
    magnitude, apart from float32's own rounding of the norm. Rounding at random chooses between
    the two neighbours so that the mean of the values, not of the angles, is right; the error is
    then at most twice that. NaN, infinity and magnitudes above 2¹²⁵ are refused.

    Ratio to float32: 32 / S for S of 2, 4 and 8, which are packed; else 4, one byte for each. The
    norm and the bound take 16 bytes.

    Args:
        bits: S, from 2 to 8.
        name: with the parameter as it was written.
    """

    def __init__(self, bits: int, name: str) -> None:
        self.name = name
        self._bits = bits if bits in (2, 4) else 8  # that a code takes
        self._most = 2 ** (bits - 1) - 1  # m

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        plain = tensor.detach().reshape(-1).to(torch.float32)
        largest = max_magnitude(plain)
        if not largest <= _LARGEST:  # NaN too
            raise range_error(self.name, _LARGEST, largest)
        unit = power_of_two_above(largest)
        scaled = plain / unit
        norm = _norm(scaled)
        bound = math.asin(min(1.0, largest / unit / norm)) if norm else 0.0
        codes = self._codes(scaled, norm, bound, generator).add_(self._most).to(torch.uint8)
        header = bytearray(_HEADER.pack(norm * unit, bound))
        return [to_buffer(_packed(codes, self._bits)), memoryview(header)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        elements = math.prod(shape)
        return [-(-elements * self._bits // 8), _HEADER.size]

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        norm, bound = _HEADER.unpack(buffers[1])
        if not (0 <= bound <= math.pi / 2 and 0 <= norm * math.sin(bound) <= 2 * _LARGEST):
            raise MalformedFrame(
                "norm and bound are those of a finite tensor",
                field="norm",
                limit=2 * _LARGEST,
                value=[norm, bound],
            )
        elements = math.prod(shape)
        packed = from_buffer(buffers[0], torch.uint8, buffers[0].nbytes)
        if unused := packed.numel() * 8 // self._bits - elements:
            _check_unused(int(packed[-1]), 8 - unused * self._bits)
        packed = to_device(packed, device)
        values = [norm * sine for sine in self._sines(bound)]
        levels = torch.tensor(values, dtype=torch.float32, device=device)
        decoded = torch.empty(elements, dtype=torch.float32, device=device)
        at_once = rows_per_chunk(1, decoded.device) // 8 * 8
        for out, part in zip(
            decoded.split(at_once), packed.split(at_once * self._bits // 8), strict=True
        ):
            codes = _unpacked(part, self._bits)[: len(out)]
            if len(out) and int(codes.max()) >= len(levels):
                raise MalformedFrame(
                    "a code is not in use",
                    field="codes",
                    limit=len(levels) - 1,
                    value=int(codes.max()),
                )
            torch.index_select(levels, 0, codes.to(torch.int32), out=out)
        return decoded.reshape(tuple(shape))

    def _codes(
        self, values: Tensor, norm: float, bound: float, generator: torch.Generator | None
    ) -> Tensor:
        """Codes −m … m of values [n] of this norm; ``values`` may be overwritten."""
        if bound == 0:
            return torch.zeros_like(values)
        sines = values.mul_(1 / norm).clamp_(-1, 1)
        codes = torch.asin(sines).mul_(self._most / bound)
        if generator is None:
            return codes.round_().clamp_(-self._most, self._most)
        lower = codes.floor_().clamp_(-self._most, self._most - 1)
        levels = torch.tensor(self._sines(bound), dtype=torch.float32, device=values.device)
        places = (lower + self._most).to(torch.int64)
        below, above = levels[places], levels[places + 1]
        noise = torch.rand(values.shape, generator=generator, device=generator.device)
        return lower.add_(noise.to(values.device) * (above - below) < sines - below)

    def _sines(self, bound: float) -> list[float]:
        """The sines of the angles of all codes."""
        codes = range(-self._most, self._most + 1)
        return [math.sin(code * bound / self._most) for code in codes]


def _norm(values: Tensor) -> float:
    """The norm of float32 values of magnitudes up to 1, in double precision."""
    parts = values.split(rows_per_chunk(1, values.device))
    return math.sqrt(sum(float(part.to(torch.float64).square().sum()) for part in parts))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n] with 8 / bits codes in a byte, the first one in its lowest bits."""
    if bits == 8:
        return codes
    in_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % in_byte)).view(-1, in_byte)
    packed = padded[:, 0].clone()
    for place in range(1, in_byte):
        packed |= padded[:, place] << (bits * place)
    return packed


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes again: uint8 [bytes · 8 / bits]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts).bitwise_and_(2**bits - 1).flatten()


def _check_unused(byte: int, used: int) -> None:
    """Refuse a last byte with something in the bits above the lowest ``used``."""
    if byte >> used:
        raise MalformedFrame("unused bits are zero", field="codes", limit=0, value=byte >> used)
