"""What a run tunes: prompts and tail, and what is tuned of head and body, by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from protocol.plan import ModelPlan, PromptPlacement
from protocol.seeds import derive_seed
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.errors import WeightsMismatchError
from split_model.layers.adapters import initial_adapter, initial_lora, is_lora
from split_model.layers.prompts import initial_prompts, prompt_shape
from split_model.parts.base import Part
from split_model.parts.body import Body
from split_model.parts.head import ADAPTER, Head
from split_model.parts.tail import Tail, is_classifier

# "prompts", and "head.", "body." or "tail." before timm's names
TunedState = dict[str, Tensor]

PROMPTS = "prompts"

HEAD = "head."

BODY = "body."

TAIL = "tail."

_CLASSIFIER_DEVIATION = 0.02


def state_shapes(settings: ModelPlan) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the state, computed without memory for the parts.

    Raises `UnsupportedBackboneError` or `ModelPlanError`.
    """
    return dict(_shapes(settings))


@functools.lru_cache(maxsize=64)
def _shapes(settings: ModelPlan) -> dict[str, tuple[int, ...]]:
    # A server asks for every update that it checks.
    shapes: dict[str, tuple[int, ...]] = {}
    parts: list[tuple[str, Part]] = [(HEAD, Head(settings)), (TAIL, Tail(settings))]
    if settings.tune_body:
        parts.append((BODY, Body(settings)))
    for prefix, part in parts:
        tensors = part.state_dict()
        shapes |= {prefix + name: tuple(tensors[own].shape) for name, own in part.tuned().items()}
    if settings.prompt_count:
        shapes[PROMPTS] = prompt_shape(settings)
    return shapes


def initial_state(settings: ModelPlan, weights: Mapping[str, Tensor], seed: int) -> TunedState:
    """Pretrained weights, and a fresh classifier, prompts and what is added, all from one seed.

    The classifier is the same whatever is tuned beside it. Raises `WeightsMismatchError` where
    `weights` lacks a pretrained tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    state: TunedState = {}
    for name, shape in sorted(state_shapes(settings).items()):
        if name == PROMPTS:
            state[name] = initial_prompts(settings, seed)
            continue
        prefix, own = name.split(".", 1)
        if name.startswith(HEAD + ADAPTER):
            state[name] = initial_adapter(own, shape, derive_seed(seed, "adapter"))
        elif is_lora(own):
            state[name] = initial_lora(own, shape, derive_seed(seed, own))
        elif prefix + "." == TAIL and is_classifier(own):
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


def device_shapes(settings: ModelPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of what a device tunes: all of the state, less what is tuned on the server."""
    shapes = state_shapes(settings)
    return {name: shapes[name] for name in shapes if not is_server_side(name, settings.prompt_at)}


def is_server_side(name: str, prompt_at: PromptPlacement) -> bool:
    """Whether a tensor of a state is tuned on the server, and never seen by a device.

    That are prompts that join at the cut, and a tuned body.
    """
    return name.startswith(BODY) or (name == PROMPTS and prompt_at == "cut")


def check_state(settings: ModelPlan, state: Mapping[str, Tensor]) -> None:
    """Raise `WeightsMismatchError` unless names and shapes are exactly the settings' own."""
    _check(state_shapes(settings), state)


def check_device_state(settings: ModelPlan, state: Mapping[str, Tensor]) -> None:
    """As `check_state`, for what a device has of the state."""
    _check(device_shapes(settings), state)


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


def head_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's part of a state, by the head's names for them."""
    return {name.removeprefix(HEAD): t for name, t in state.items() if name.startswith(HEAD)}


def body_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The body's part of a state, by timm's names; empty where the body is frozen."""
    return {name.removeprefix(BODY): t for name, t in state.items() if name.startswith(BODY)}


def read_body(body: Body) -> TunedState:
    """What is tuned of a body, by its names in a state: float32 copies on the CPU."""
    own = body.state_dict()
    return {BODY + name: _copy(own[place]) for name, place in body.tuned().items()}


def apply_state(
    tail: Tail, prompts: Tensor | None, state: Mapping[str, Tensor], head: Head | None = None
) -> None:
    """Copy a device's state into its parts, in place; optimisers keep their hold.

    `head` may be left out where nothing of it is tuned. Raises `WeightsMismatchError` before
    anything is changed.
    """
    check_device_state(tail.settings, state)
    if prompts is not None and PROMPTS in state and prompts.shape != state[PROMPTS].shape:
        limit = f"of shape {list(prompts.shape)}"
        raise WeightsMismatchError(PROMPTS, limit, list(state[PROMPTS].shape))
    live = _live(tail, head)
    if prompts is not None and PROMPTS in state:
        live[PROMPTS] = prompts
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])


def read_state(tail: Tail, prompts: Tensor | None, head: Head | None = None) -> TunedState:
    """The state of a device's parts, its prompts where they are given: float32 copies on the CPU.

    `head` may be left out where nothing of it is tuned; else raises `WeightsMismatchError`.
    """
    state = {name: _copy(tensor) for name, tensor in _live(tail, head).items()}
    if prompts is not None:
        state[PROMPTS] = _copy(prompts)
    return state


def _live(tail: Tail, head: Head | None) -> dict[str, Tensor]:
    """What is tuned of these parts, by its names in a state: the tensors themselves."""
    if head is None and tail.settings.tunes_head:
        raise WeightsMismatchError(HEAD, f"given where {tail.settings.tune} is tuned", "missing")
    live: dict[str, Tensor] = {}
    for prefix, part in ((HEAD, head), (TAIL, tail)):
        if part is not None:
            own = part.state_dict(keep_vars=True)
            live |= {prefix + name: own[place] for name, place in part.tuned().items()}
    return live


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state as safetensors, whole or not at all."""
    write_tensors(path, state)


def load_state(path: Path) -> TunedState:
    """Read what `save_state` wrote. Raises `TensorFileError`."""
    return dict(TensorFile(path))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


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
