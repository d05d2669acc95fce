"""A global state as its difference from an earlier one, in whatever codec."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from split_model.part import WeightsMismatchError
from split_model.tuned_state import TunedState


def state_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state as the bytes of a safetensors file: equal states give equal bytes."""
    plain = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    return safetensors.torch.save(plain)


def difference(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> TunedState:
    """What takes ``base`` to ``state``, tensor by tensor. Raises `WeightsMismatchError`."""
    _require_alike(state, base)
    return {name: state[name] - base[name] for name in sorted(state)}


def applied(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> TunedState:
    """``base`` with a difference taken in, in float32. Raises `WeightsMismatchError`."""
    _require_alike(delta, base)
    return {name: base[name] + delta[name].to(base[name].dtype) for name in sorted(base)}


def _require_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    if set(one) != set(other):
        raise WeightsMismatchError("state", f"of tensors {sorted(other)}", sorted(one))
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            limit = f"of shape {list(other[name].shape)}"
            raise WeightsMismatchError(name, limit, list(tensor.shape))
