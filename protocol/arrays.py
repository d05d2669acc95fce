"""Arrays of NumPy or torch: each codec is written once, and computes with the library of its array.

The contract of this package towards both libraries:

- Encoding accepts a NumPy array or a torch tensor on any device, and computes where the array is.
- Decoding returns a NumPy array (`Frame.array`), or a torch tensor on a device (`Frame.tensor`).
- On a CPU, both libraries encode to the same bytes with all codecs that only compare, divide and
  round (the dtypes, `int8`, `int4`, `int4-asym`, `topk`; also with ``+zstd``), and both decode to
  the same numbers. Codecs that multiply matrices or compute sines (`klt`, `svd`, `pq`, `cosine`)
  agree within the last digits of float32, so that a code may differ by one.
- Random rounding takes its noise from the generator's library, whatever the array's is: equal
  states of equal generators give equal codes for a NumPy array and for a tensor.
- torch is imported only when a tensor or a device of torch is passed.
- NumPy has no bfloat16: a decoded array has these numbers as float32, and a 16-bit pattern of one
  is an int16.

The functions of the array API standard come from array-api-compat; a `Backend` adds the others.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import array_api_compat.numpy as np_api
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = [
    "NUMPY",
    "Array",
    "Backend",
    "Device",
    "Generator",
    "SomeArray",
    "as_numpy",
    "backend_of",
    "backend_on",
    "chunks",
    "widen",
]


Array: TypeAlias = "NDArray[Any] | torch.Tensor"

Device: TypeAlias = "torch.device | str"

SomeArray = TypeVar("SomeArray", bound="NDArray[Any] | torch.Tensor")  # one library's

Generator: TypeAlias = "np.random.Generator | torch.Generator"


class Backend(ABC):
    """A library of arrays, and a device on which it computes.

    Methods with an ``out`` fill it. Arrays are typed ``Any``: no type covers both libraries.

    Attributes:
        xp: the library's functions of the array API standard.
        chunk_bytes: scratch memory of a loop over parts of an array.
        linalg_error: what a decomposition raises that does not converge.
    """

    xp: Any
    chunk_bytes: int
    linalg_error: type[Exception]

    @abstractmethod
    def own(self, array: Any) -> Any:
        """Return an array on this device: without gradient, and not copied if possible."""

    @abstractmethod
    def contiguous(self, array: Any) -> Any:
        """Return an array that is row-major without gaps."""

    @abstractmethod
    def empty(self, *shape: int) -> Any:
        """Return a float32 array with any content."""

    @abstractmethod
    def host(self, array: Any) -> NDArray[Any]:
        """Return an array in the CPU's memory, row-major; bfloat16 as its bits, int16."""

    @abstractmethod
    def draw(self, shape: Sequence[int], generator: Generator) -> Any:
        """Draw float32 numbers from 0 to below 1."""

    @abstractmethod
    def to_bfloat16(self, values: Any) -> Any:
        """Round float32 to the nearest bfloat16, ties to even, as bits: int16."""

    @abstractmethod
    def from_bfloat16(self, bits: NDArray[np.int16]) -> Any:
        """Return numbers from their bits: bfloat16 here if the library has it, else float32."""

    @abstractmethod
    def floor(self, values: Any) -> Any:
        """Round down in place, and return the values."""

    @abstractmethod
    def clip(self, values: Any, low: float, high: float) -> Any:
        """Clip in place, and return the values."""

    @abstractmethod
    def magnitude(self, array: Any) -> float:
        """Return the largest absolute value of an array with elements; NaN if any is NaN."""

    @abstractmethod
    def kth_largest(self, values: Any, count: int) -> Any:
        """Return the ``count``-th largest number of [n]."""

    @abstractmethod
    def add_product(self, bias: Any, left: Any, right: Any, out: Any, sign: int = 1) -> Any:
        """Fill ``out`` with bias + sign · left @ right, and return it."""

    @abstractmethod
    def argmin(self, scores: Any) -> Any:
        """Return the column of the least number of each row: int64."""

    @abstractmethod
    def bincount(self, codes: Any, weights: Any, length: int) -> Any:
        """Count each code, or add its weights, if there are any."""


class _NumPyBackend(Backend):
    """NumPy, on the CPU."""

    xp = np_api
    chunk_bytes = 384 * 1024  # a second pass still finds the chunk in a small cache
    linalg_error = np.linalg.LinAlgError

    def own(self, array: Any) -> Any:
        return as_numpy(array)

    def contiguous(self, array: Any) -> Any:
        return np.ascontiguousarray(array)

    def empty(self, *shape: int) -> Any:
        return np.empty(shape, np.float32)

    def host(self, array: Any) -> NDArray[Any]:
        return np.ascontiguousarray(array)

    def draw(self, shape: Sequence[int], generator: Generator) -> Any:
        if isinstance(generator, np.random.Generator):
            return generator.random(tuple(shape), np.float32)
        return as_numpy(backend_on(generator.device).draw(shape, generator))

    def to_bfloat16(self, values: Any) -> Any:
        bits = values.view(np.uint32)
        rounded = np.asarray((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16)
        rounded[np.isnan(values)] = 0x7FC0  # rounding could carry a NaN to infinity
        return rounded.astype(np.uint16).view(np.int16)

    def from_bfloat16(self, bits: NDArray[np.int16]) -> Any:
        return widen(bits)

    def floor(self, values: Any) -> Any:
        return np.floor(values, out=values)

    def clip(self, values: Any, low: float, high: float) -> Any:
        return np.clip(values, low, high, out=values)

    def magnitude(self, array: Any) -> float:
        return float(np.maximum(-array.min(), array.max()))

    def kth_largest(self, values: Any, count: int) -> Any:
        place = len(values) - count
        return np.partition(values, place)[place]

    def add_product(self, bias: Any, left: Any, right: Any, out: Any, sign: int = 1) -> Any:
        np.matmul(left, right, out=out)
        return np.add(bias, out, out=out) if sign > 0 else np.subtract(bias, out, out=out)

    def argmin(self, scores: Any) -> Any:
        return scores.argmin(1)

    def bincount(self, codes: Any, weights: Any, length: int) -> Any:
        return np.bincount(codes, weights, length)


NUMPY = _NumPyBackend()


def backend_of(array: Array) -> Backend:
    """Return the backend of an array: its library, on its device.

    Raises:
        TypeError: it is neither a NumPy array nor a torch tensor.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return NUMPY
    if _is_tensor(array):
        return backend_on(array.device)
    raise TypeError(f"expected a NumPy array or a torch tensor, not {type(array).__name__}")


def backend_on(device: Device | None) -> Backend:
    """Return torch's backend on a device; None: NumPy's."""
    if device is None:
        return NUMPY
    from protocol.torch_arrays import TorchBackend

    return TorchBackend(device)


def as_numpy(array: Array) -> NDArray[Any]:
    """Return an array or a tensor as a NumPy array: a tensor's own memory, if it is on the CPU.

    bfloat16 becomes float32.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return np.asarray(array)
    tensor = array.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    numbers: NDArray[Any] = tensor.cpu().numpy()
    return numbers


def widen(bits: Any, backend: Backend = NUMPY) -> Any:
    """Return the float32 numbers whose upper 16 bits are these (int16)."""
    return (backend.xp.astype(bits, backend.xp.int32) << 16).view(backend.xp.float32)


def chunks(rows: int, *arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the parts of arrays of equal length, of at most ``rows`` rows each, side by side.

    There is at least one, which may be empty.
    """
    for start in range(0, max(len(arrays[0]), 1), rows):
        yield tuple(array[start : start + rows] for array in arrays)


def _is_tensor(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)
