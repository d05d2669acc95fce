"""Quantisation of angles: the norm of a tensor, and the angle of each element in a few bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.arrays import Backend, Generator, chunks
from protocol.codecs.codec import FixedSizeCodec
from protocol.codecs.memory import (
    MAX_MAGNITUDE,
    check_magnitude,
    from_buffer,
    power_of_two_above,
    rows_per_chunk,
    to_buffer,
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

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        xp = backend.xp
        plain = xp.astype(array.reshape(-1), xp.float32, copy=False)
        magnitude = check_magnitude(self.name, backend, plain)
        unit = power_of_two_above(magnitude)
        scaled = plain / unit
        norm = _norm(backend, scaled)
        bound = math.asin(min(1.0, magnitude / unit / norm)) if norm else 0.0
        codes = self._compute_codes(backend, scaled, norm, bound, generator)
        codes = xp.astype(codes + self._max_code, xp.uint8)
        header = bytearray(_HEADER.pack(norm * unit, bound))
        packed = backend.host(_pack(xp, codes, self._bits))
        return [to_buffer(packed), memoryview(header)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        elements = math.prod(shape)
        return [-(-elements * self._bits // 8), _HEADER.size]

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        norm, bound = _HEADER.unpack(buffers[1])
        if not (0 <= bound <= math.pi / 2 and 0 <= norm * math.sin(bound) <= 2 * MAX_MAGNITUDE):
            raise MalformedFrame(
                "norm and bound must be those of a finite tensor",
                field="norm",
                limit=2 * MAX_MAGNITUDE,
                value=[norm, bound],
            )
        elements = math.prod(shape)
        packed = from_buffer(buffers[0], "u1", buffers[0].nbytes)
        if unused := packed.size * 8 // self._bits - elements:
            _check_unused(int(packed[-1]), 8 - unused * self._bits)
        xp, packed = backend.xp, backend.own(packed)
        levels = backend.own(np.asarray(norm * self._compute_sines(bound), np.float32))
        decoded = backend.empty(elements)
        chunk_bytes = rows_per_chunk(1, backend) // 8 * self._bits
        for start in range(0, len(packed), chunk_bytes):
            first = start * 8 // self._bits
            out = decoded[first : first + chunk_bytes * 8 // self._bits]
            codes = _unpack(xp, packed[start : start + chunk_bytes], self._bits)[: len(out)]
            if len(out) and int(codes.max()) >= len(levels):
                raise MalformedFrame(
                    "a code must be at most 2 m",
                    field="codes",
                    limit=len(levels) - 1,
                    value=int(codes.max()),
                )
            out[...] = xp.take(levels, xp.astype(codes, xp.int32), axis=0)
        return decoded.reshape(tuple(shape))

    def _compute_codes(
        self,
        backend: Backend,
        values: Any,
        norm: float,
        bound: float,
        generator: Generator | None,
    ) -> Any:
        """Return codes −m … m of values [n] with this norm; may overwrite ``values``."""
        xp = backend.xp
        if bound == 0:
            return xp.zeros_like(values)
        values *= 1 / norm
        sines = backend.clip(values, -1, 1)
        codes = xp.asin(sines)
        codes *= self._max_code / bound
        if generator is None:
            return backend.clip(xp.round(codes, out=codes), -self._max_code, self._max_code)
        lower = backend.clip(backend.floor(codes), -self._max_code, self._max_code - 1)
        levels = backend.own(np.asarray(self._compute_sines(bound), np.float32))
        indices = xp.astype(lower + self._max_code, xp.int64)
        below, above = levels[indices], levels[indices + 1]
        lower += backend.draw(values.shape, generator) * (above - below) < sines - below
        return lower

    def _compute_sines(self, bound: float) -> NDArray[np.float64]:
        """Return the sine of the angle of each code, from −m to m."""
        codes = range(-self._max_code, self._max_code + 1)
        return np.array([math.sin(code * bound / self._max_code) for code in codes])


def _norm(backend: Backend, values: Any) -> float:
    """Return the norm of float32 values of magnitudes up to 1, in double precision."""
    xp = backend.xp
    parts = chunks(rows_per_chunk(1, backend), values)
    return math.sqrt(sum(float(xp.sum(xp.astype(part, xp.float64) ** 2)) for (part,) in parts))


def _pack(xp: Any, codes: Any, bits: int) -> Any:
    """Pack uint8 codes [n], 8 / bits in a byte, the first in its lowest bits."""
    if bits == 8:
        return codes
    codes_per_byte = 8 // bits
    packed = xp.empty_like(codes[::codes_per_byte])
    packed[...] = codes[::codes_per_byte]
    for index in range(1, codes_per_byte):
        column = codes[index::codes_per_byte]
        packed[: len(column)] |= column << (bits * index)
    return packed


def _unpack(xp: Any, packed: Any, bits: int) -> Any:
    """Unpack bytes into codes: uint8 [bytes · 8 / bits]."""
    if bits == 8:
        return packed
    columns = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return xp.stack(columns, axis=1).reshape(-1)


def _check_unused(byte: int, used: int) -> None:
    """Refuse a last byte with a bit set above the lowest ``used`` bits."""
    if byte >> used:
        raise MalformedFrame("unused bits must be zero", field="codes", limit=0, value=byte >> used)
