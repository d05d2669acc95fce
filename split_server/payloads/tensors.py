"""Judges an update before it may count."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import lru_cache

import torch
from torch import Tensor

import split_model
from protocol.codec_names import FLOAT_CODECS
from protocol.codecs import get_codec
from protocol.errors import InvalidField, NonFinite, TooLarge, WrongShape
from protocol.frames import Frame
from protocol.limits import FrameLimits
from protocol.plan import ModelPlan


@lru_cache(maxsize=64)
def _shapes(model: ModelPlan) -> Mapping[str, tuple[int, ...]]:
    return split_model.device_shapes(model)


def read_update(frame: Frame, model: ModelPlan, beside: Collection[str] = ()) -> dict[str, Tensor]:
    """A device's tensors of an update in float32, if exactly those of the run, and finite.

    Those named ``beside`` them are others' to read.

    Raises:
        WrongShape: a tensor is missing, unknown, or of another shape.
        InvalidField: a codec that carries no floating-point numbers.
        NonFinite: NaN or infinity in a tensor.
    """
    shapes = _shapes(model)
    if set(frame.specs) - set(beside) != set(shapes):
        raise WrongShape(
            "an update holds exactly the tensors of the global state",
            field="tensors",
            limit=sorted(shapes),
            value=sorted(frame.specs),
        )
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        spec = frame.specs[name]
        if spec.shape != tuple(shape):
            raise WrongShape(
                "a tensor of the update has another shape than the global state's",
                field=name,
                limit=list(shape),
                value=list(spec.shape),
            )
        tensors[name] = read_floats(frame, name)
    return tensors


def read_floats(frame: Frame, name: str) -> Tensor:
    """One tensor of a frame in float32.

    Raises:
        MalformedFrame: the frame lacks it.
        InvalidField: its codec carries no floating-point numbers.
        NonFinite: it holds NaN or infinity.
    """
    plain = read_tensor(frame, name).to(torch.float32)
    require_finite({name: plain})
    return plain


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFinite: naming the tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise NonFinite("a tensor holds NaN or infinity", field=name)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum takes a twentieth of the time of a look at every number, and nothing that is not finite
    gets lost in it. Where it is not finite, large numbers may be the reason: then each is looked
    at.
    """
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def read_tensor(frame: Frame, name: str, device: torch.device | str = "cpu") -> Tensor:
    """One tensor of floating-point numbers, in the dtype of its codec and not yet looked into.

    Its shape has to be checked first: a small frame may stand for a tensor of any size.

    Raises:
        MalformedFrame: the frame lacks it.
        InvalidField: its codec carries no floating-point numbers.
    """
    spec = frame.spec(name)
    if not get_codec(spec.codec).floating:
        raise InvalidField(
            "this tensor takes a codec of floating-point numbers",
            field=name,
            limit=list(FLOAT_CODECS),
            value=spec.codec,
        )
    return frame.tensor(name, device)


def read_smashed(
    frame: Frame,
    settings: ModelPlan,
    limits: FrameLimits,
    device: torch.device | str = "cpu",
    most: int | None = None,
) -> Tensor:
    """The frame's smashed data [B, T, D], of a shape that a body of these settings takes.

    T are the tokens that leave the head, prompts included if they join at the input.

    Args:
        frame, settings: what came, and the run's.
        limits: of the server; they bound what is decoded, too.
        device: where it is decoded.
        most: samples of a training step; None: any number.

    Raises:
        MalformedFrame, WrongShape, TooLarge
        InvalidField: more samples than ``most``, or no codec for smashed data.
    """
    inside = settings.prompt_count if settings.prompt_at == "input" else 0
    tokens = split_model.anatomy(settings).tokens + inside
    return _read_tokens(frame, "smashed", settings, limits, tokens, device, most)


def read_gradients(
    frame: Frame,
    settings: ModelPlan,
    limits: FrameLimits,
    device: torch.device | str,
    num_tokens: int | None,
    most: int,
) -> Tensor:
    """The frame's gradient [B, T', D] of features that the run hands out.

    T' are the ``num_tokens`` tokens, or all, prompts included. Raises as `read_smashed` does.
    """
    tokens = num_tokens
    if tokens is None:
        tokens = split_model.anatomy(settings).tokens + settings.prompt_count
    return _read_tokens(frame, "gradients", settings, limits, tokens, device, most)


def _read_tokens(
    frame: Frame,
    name: str,
    settings: ModelPlan,
    limits: FrameLimits,
    tokens: int,
    device: torch.device | str,
    most: int | None,
) -> Tensor:
    width, shape = split_model.anatomy(settings).width, list(frame.spec(name).shape)
    if len(shape) != 3 or shape[0] < 1 or shape[1:] != [tokens, width]:
        raise WrongShape(
            "a tensor of the split plane is [samples, tokens, width]",
            field=name,
            limit=["at least 1", tokens, width],
            value=shape,
        )
    check_batch(shape[0], most, name)
    check_decoded(math.prod(shape), name, limits)
    return read_tensor(frame, name, device)


def check_decoded(elements: int, name: str, limits: FrameLimits) -> None:
    """Refuse what is small on the wire and large in memory.

    Raises:
        TooLarge: it is over what one frame may hold.
    """
    limit = limits.max_frame_bytes
    if elements * torch.float32.itemsize > limit:
        raise TooLarge(
            "a tensor is too large once it is decoded",
            field=name,
            limit=limit,
            value=elements * torch.float32.itemsize,
            hint="send fewer samples in a request",
        )


def check_batch(samples: int, most: int | None, name: str) -> None:
    """Refuse a training step of more samples than a batch of the run.

    Raises:
        InvalidField: there are more.
    """
    if most is not None and samples > most:
        raise InvalidField(
            "a training step holds at most batch_size samples",
            field=name,
            limit=most,
            value=samples,
        )
