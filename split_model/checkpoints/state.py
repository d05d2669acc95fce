"""The tuned state of a run: prompts, tail, and tuned tensors of head and body, by name."""

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
from split_model.parts.depths import make_tail
from split_model.parts.head import ADAPTER, Head
from split_model.parts.tail import Tail, is_classifier

# Keys: "prompts", and timm's names behind "head.", "body." or "tail."
TunedState = dict[str, Tensor]

PROMPTS = "prompts"

HEAD = "head."

BODY = "body."

TAIL = "tail."

_CLASSIFIER_DEVIATION = 0.02


def state_shapes(settings: ModelPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a state, computed without allocating the parts.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: the plan does not fit the backbone.
    """
    return dict(_cached_shapes(settings))


@functools.lru_cache(maxsize=64)
def _cached_shapes(settings: ModelPlan) -> dict[str, tuple[int, ...]]:
    # Cached because a server needs the shapes for each update.
    shapes: dict[str, tuple[int, ...]] = {}
    parts: list[tuple[str, Part]] = [(HEAD, Head(settings)), (TAIL, make_tail(settings))]
    if settings.tune_body:
        parts.append((BODY, Body(settings)))
    for prefix, part in parts:
        tensors = part.state_dict()
        shapes |= {prefix + name: tuple(tensors[key].shape) for name, key in part.tuned().items()}
    if settings.prompt_count:
        shapes[PROMPTS] = prompt_shape(settings)
    return shapes


def initial_state(settings: ModelPlan, weights: Mapping[str, Tensor], seed: int) -> TunedState:
    """The state before the first round: pretrained weights, and seeded values for new tensors.

    New tensors are classifier, prompts, adapter and LoRA. The classifier does not depend on what
    else is tuned.

    Args:
        settings: the model's plan.
        weights: the backbone's, by timm's names.
        seed: of the new tensors.

    Raises:
        WeightsMismatchError: ``weights`` lacks a pretrained tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    state: TunedState = {}
    for name, shape in sorted(state_shapes(settings).items()):
        if name == PROMPTS:
            state[name] = initial_prompts(settings, seed)
            continue
        prefix, part_name = name.split(".", 1)
        if name.startswith(HEAD + ADAPTER):
            state[name] = initial_adapter(part_name, shape, derive_seed(seed, "adapter"))
        elif is_lora(part_name):
            state[name] = initial_lora(part_name, shape, derive_seed(seed, part_name))
        elif prefix + "." == TAIL and is_classifier(part_name):
            state[name] = torch.zeros(shape)
            if part_name.endswith(".weight"):
                state[name] = torch.randn(shape, generator=generator) * _CLASSIFIER_DEVIATION
        elif part_name in weights:
            state[name] = weights[part_name].detach().to("cpu", torch.float32).clone()
        else:
            raise WeightsMismatchError(part_name, f"of shape {list(shape)}", "missing")
    check_state(settings, state)
    return state


def device_shapes(settings: ModelPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a device tunes: the state without server-side tensors."""
    shapes = state_shapes(settings)
    return {name: shapes[name] for name in shapes if not is_server_side(name, settings.prompt_at)}


def is_server_side(name: str, prompt_at: PromptPlacement) -> bool:
    """Whether a tensor of a state is tuned on the server and never sent to a device.

    That is so for a tuned body, and for prompts at the cut.
    """
    return name.startswith(BODY) or (name == PROMPTS and prompt_at == "cut")


def check_state(settings: ModelPlan, state: Mapping[str, Tensor]) -> None:
    """Raise `WeightsMismatchError` unless names and shapes are exactly those of the plan."""
    _check_shapes(state_shapes(settings), state)


def check_device_state(settings: ModelPlan, state: Mapping[str, Tensor]) -> None:
    """As `check_state`, for a device's part of the state."""
    _check_shapes(device_shapes(settings), state)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    for name in state:
        if name not in shapes:
            raise WeightsMismatchError(name, f"one of {sorted(shapes)}", "unknown")
    for name, shape in shapes.items():
        given = tuple(state[name].shape) if name in state else "missing"
        if given != shape:
            raise WeightsMismatchError(name, f"of shape {list(shape)}", given)


def tail_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tail's tensors of a state, by timm's names, for `build_tail`."""
    return _without_prefix(state, TAIL)


def head_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors of a state, by timm's names and those of added tensors."""
    return _without_prefix(state, HEAD)


def body_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The body's tensors of a state, by timm's names; empty if the body is frozen."""
    return _without_prefix(state, BODY)


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def read_body(body: Body) -> TunedState:
    """Copy a body's tuned tensors, by the names of a state, in float32 to the CPU."""
    tensors = body.state_dict()
    return {BODY + name: _copy(tensors[key]) for name, key in body.tuned().items()}


def apply_state(
    tail: Tail, prompts: Tensor | None, state: Mapping[str, Tensor], head: Head | None = None
) -> None:
    """Copy a device's state into its parts, in place, so that optimisers stay valid.

    Args:
        tail: changed.
        prompts: changed, unless None.
        state: the device's part of a state.
        head: changed; needed only if the plan tunes the head.

    Raises:
        WeightsMismatchError: the state does not fit; nothing was changed.
    """
    check_device_state(tail.settings, state)
    if prompts is not None and PROMPTS in state and prompts.shape != state[PROMPTS].shape:
        limit = f"of shape {list(prompts.shape)}"
        raise WeightsMismatchError(PROMPTS, limit, list(state[PROMPTS].shape))
    live = _live_tensors(tail, head)
    if prompts is not None and PROMPTS in state:
        live[PROMPTS] = prompts
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])


def read_state(tail: Tail, prompts: Tensor | None, head: Head | None = None) -> TunedState:
    """Copy the tuned tensors of a device's parts, in float32 to the CPU.

    Raises:
        WeightsMismatchError: ``head`` is missing although the plan tunes it.
    """
    state = {name: _copy(tensor) for name, tensor in _live_tensors(tail, head).items()}
    if prompts is not None:
        state[PROMPTS] = _copy(prompts)
    return state


def _live_tensors(tail: Tail, head: Head | None) -> dict[str, Tensor]:
    """The parts' tuned tensors themselves, by the names of a state."""
    if head is None and tail.settings.tunes_head:
        raise WeightsMismatchError(HEAD, f"given with tune = {tail.settings.tune}", "missing")
    live: dict[str, Tensor] = {}
    for prefix, part in ((HEAD, head), (TAIL, tail)):
        if part is not None:
            tensors = part.state_dict(keep_vars=True)
            live |= {prefix + name: tensors[key] for name, key in part.tuned().items()}
    return live


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state durably as safetensors."""
    write_tensors(path, state)


def load_state(path: Path) -> TunedState:
    """Read a file of `save_state`.

    Raises:
        TensorFileError: the file cannot be read.
    """
    return dict(TensorFile(path))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def state_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Serialise a state as safetensors; equal states give equal bytes."""
    plain = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    return safetensors.torch.save(plain)


def difference(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> TunedState:
    """Subtract ``base`` from ``state``, tensor by tensor.

    Raises:
        WeightsMismatchError: names or shapes differ.
    """
    _check_alike(state, base)
    return {name: state[name] - base[name] for name in sorted(state)}


def applied(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> TunedState:
    """Add a `difference` to ``base``, in float32.

    Raises:
        WeightsMismatchError: names or shapes differ.
    """
    _check_alike(delta, base)
    return {name: base[name] + delta[name].to(base[name].dtype) for name in sorted(base)}


def _check_alike(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if set(state) != set(expected):
        raise WeightsMismatchError("state", f"of tensors {sorted(expected)}", sorted(state))
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            limit = f"of shape {list(expected[name].shape)}"
            raise WeightsMismatchError(name, limit, list(tensor.shape))
