"""Global states as NumPy arrays: read, written, subtracted and added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from split_model.errors import TensorFileError, WeightsMismatchError

Floats = NDArray[np.float32]

State = dict[str, Floats]


def load_state(path: Path) -> State:
    """Read a state's file.

    Raises:
        TensorFileError: the file cannot be read, or has tensors that are not float32.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError, TypeError, KeyError, AttributeError) as error:
        raise TensorFileError(path, f"not a readable safetensors file ({error})") from error
    for name, array in state.items():
        if array.dtype != np.float32:
            raise TensorFileError(path, f"{name} is {array.dtype}, not float32")
    return dict(state)


def state_bytes(state: Mapping[str, Floats]) -> bytes:
    """Serialise a state as safetensors; equal states give equal bytes, here and on the server."""
    return save({name: np.ascontiguousarray(state[name]) for name in sorted(state)})


def check_shapes(state: Mapping[str, Floats], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a state of other tensors.

    Raises:
        WeightsMismatchError: names or shapes differ.
    """
    for name in state:
        if name not in shapes:
            raise WeightsMismatchError(name, f"one of {sorted(shapes)}", "unknown")
    for name, shape in shapes.items():
        given = tuple(state[name].shape) if name in state else "missing"
        if given != shape:
            raise WeightsMismatchError(name, f"of shape {list(shape)}", given)


def difference(state: Mapping[str, Floats], base: Mapping[str, Floats]) -> State:
    """Subtract ``base`` from ``state``, tensor by tensor.

    Raises:
        WeightsMismatchError: names or shapes differ.
    """
    check_shapes(state, {name: array.shape for name, array in base.items()})
    return {name: state[name] - base[name] for name in sorted(state)}


def applied(base: Mapping[str, Floats], delta: Mapping[str, NDArray[np.floating]]) -> State:
    """Add a `difference` to ``base``, in float32.

    Raises:
        WeightsMismatchError: names or shapes differ.
    """
    floats = {name: np.asarray(array, np.float32) for name, array in delta.items()}
    check_shapes(floats, {name: array.shape for name, array in base.items()})
    return {name: base[name] + floats[name] for name in sorted(base)}
