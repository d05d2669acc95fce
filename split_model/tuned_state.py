"""What a run tunes and sends: the prompts and the tail, as one mapping of named tensors."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from split_model.part import WeightsMismatchError
from split_model.prompts import initial_prompts, prompt_shape
from split_model.settings import SplitSettings
from split_model.tail import Tail
from split_model.tensor_file import TensorFile, write_tensors

TunedState = dict[str, Tensor]  # "prompts", and "tail." before timm's names

PROMPTS = "prompts"
TAIL = "tail."
_CLASSIFIERS = ("head.", "head_dist.")
_CLASSIFIER_DEVIATION = 0.02


def state_shapes(settings: SplitSettings) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the state, computed without memory for the tail.

    Raises `UnsupportedBackboneError` or `SplitSettingsError`.
    """
    return dict(_shapes(settings))


@functools.lru_cache(maxsize=64)
def _shapes(settings: SplitSettings) -> dict[str, tuple[int, ...]]:
    # A server asks for every update that it checks.
    tail = Tail(settings)
    state = tail.state_dict()
    shapes = {TAIL + name: tuple(state[own].shape) for name, own in tail.names().items()}
    if settings.prompt_count:
        shapes[PROMPTS] = prompt_shape(settings)
    return shapes


def initial_state(
    settings: SplitSettings,
    weights: Mapping[str, Tensor],
    seed: int,
    mean_token: Tensor | None = None,
) -> TunedState:
    """Pretrained norm and tail blocks, a fresh classifier and fresh prompts, all from one seed.

    Raises `WeightsMismatchError` where `weights` lacks a pretrained tensor of the tail.
    """
    generator = torch.Generator().manual_seed(seed)
    state: TunedState = {}
    for name, shape in sorted(state_shapes(settings).items()):
        if name == PROMPTS:
            state[name] = initial_prompts(settings, seed, mean_token)
            continue
        own = name.removeprefix(TAIL)
        if own.startswith(_CLASSIFIERS):
            fresh = torch.zeros(shape)
            if own.endswith(".weight"):
                fresh = torch.randn(shape, generator=generator) * _CLASSIFIER_DEVIATION
            state[name] = fresh
        elif own in weights:
            state[name] = weights[own].detach().to("cpu", torch.float32).clone()
        else:
            raise WeightsMismatchError(own, f"of shape {list(shape)}", "missing")
    check_state(settings, state)
    return state


def device_shapes(settings: SplitSettings) -> dict[str, tuple[int, ...]]:
    """The shapes of what a device tunes: all of the state, less prompts that join at the cut."""
    shapes = state_shapes(settings)
    if settings.prompt_at == "cut":
        shapes.pop(PROMPTS, None)
    return shapes


def check_state(settings: SplitSettings, state: Mapping[str, Tensor]) -> None:
    """Raise `WeightsMismatchError` unless names and shapes are exactly the settings' own."""
    _check(state_shapes(settings), state)


def _check(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    for name in state:
        if name not in shapes:
            raise WeightsMismatchError(name, f"one of {sorted(shapes)}", "unknown")
    for name, shape in shapes.items():
        given = tuple(state[name].shape) if name in state else "missing"
        if given != shape:
            raise WeightsMismatchError(name, f"of shape {list(shape)}", given)


def tail_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tail's part of a state, by timm's names, as `build_tail` takes it."""
    return {name.removeprefix(TAIL): t for name, t in state.items() if name.startswith(TAIL)}


def apply_state(tail: Tail, prompts: Tensor | None, state: Mapping[str, Tensor]) -> None:
    """Copy a device's state into its tail and its prompts, in place; optimisers keep their hold.

    Raises `WeightsMismatchError` before anything is changed.
    """
    _check(device_shapes(tail.settings), state)
    if prompts is not None and PROMPTS in state and prompts.shape != state[PROMPTS].shape:
        limit = f"of shape {list(prompts.shape)}"
        raise WeightsMismatchError(PROMPTS, limit, list(state[PROMPTS].shape))
    own = tail.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, own_name in tail.names().items():
            own[own_name].copy_(state[TAIL + name])
        if prompts is not None and PROMPTS in state:
            prompts.copy_(state[PROMPTS])


def read_state(tail: Tail, prompts: Tensor | None) -> TunedState:
    """The state of a tail and, where they are given, its prompts: float32 copies on the CPU."""
    own = tail.state_dict()
    state = {TAIL + name: _copy(own[own_name]) for name, own_name in tail.names().items()}
    if prompts is not None:
        state[PROMPTS] = _copy(prompts)
    return state


def save_state(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state as safetensors, whole or not at all."""
    write_tensors(path, state, metadata)


def load_state(path: Path) -> TunedState:
    """Read what `save_state` wrote. Raises `TensorFileError`."""
    return dict(TensorFile(path))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
