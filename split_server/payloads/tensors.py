"""Decode the tensors of a frame and check shape, size, codec and finiteness."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from protocol.codec_names import FLOAT_CODECS
from protocol.codecs import get_codec
from protocol.errors import InvalidField, NonFinite, TooLarge, WrongShape
from protocol.frames import Frame
from protocol.limits import FrameLimits
from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.checkpoints.state import device_shapes
from split_model.parts.depths import feature_shape

FLOAT32_BYTES = 4


@lru_cache(maxsize=64)
def _state_shapes(model: ModelPlan) -> Mapping[str, tuple[int, ...]]:
    return device_shapes(model)


def decode_update(
    frame: Frame, model: ModelPlan, extra_names: Collection[str] = ()
) -> dict[str, Tensor]:
    """Decode an update's tensors to float32: exactly the device's part of the state, all finite.

    Args:
        extra_names: further tensors that the frame may carry; another function decodes them.

    Raises:
        WrongShape: a tensor is missing, unknown, or differs in shape.
        InvalidField: a codec does not carry floating-point numbers.
        NonFinite: a tensor contains NaN or infinity.
    """
    shapes = _state_shapes(model)
    if set(frame.specs) - set(extra_names) != set(shapes):
        raise WrongShape(
            "an update must contain exactly the tensors of the global state",
            field="tensors",
            limit=sorted(shapes),
            value=sorted(frame.specs),
        )
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        spec = frame.specs[name]
        if spec.shape != tuple(shape):
            raise WrongShape(
                "a tensor of the update differs in shape from the global state",
                field=name,
                limit=list(shape),
                value=list(spec.shape),
            )
        tensors[name] = decode_floats(frame, name)
    return tensors


def decode_floats(frame: Frame, name: str) -> Tensor:
    """Decode one tensor to float32 and check that it is finite.

    Raises:
        MalformedFrame: the frame lacks the tensor.
        InvalidField: its codec does not carry floating-point numbers.
        NonFinite: it contains NaN or infinity.
    """
    decoded = decode_tensor(frame, name).to(torch.float32)
    require_finite({name: decoded})
    return decoded


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFinite: names the first such tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise NonFinite("a tensor contains NaN or infinity", field=name)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor contains neither NaN nor infinity.

    The sum propagates every non-finite value and takes a twentieth of the time of an element-wise
    check. A sum of large finite numbers may overflow too, so only then are the elements checked.
    """
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def decode_tensor(frame: Frame, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Decode one floating-point tensor in its codec's dtype, without checking its values.

    Check the shape first: a small frame may stand for a tensor of any size.

    Raises:
        MalformedFrame: the frame lacks the tensor.
        InvalidField: its codec does not carry floating-point numbers.
    """
    spec = frame.spec(name)
    if not get_codec(spec.codec).floating:
        raise InvalidField(
            "this tensor needs a codec of floating-point numbers",
            field=name,
            limit=list(FLOAT_CODECS),
            value=spec.codec,
        )
    return frame.tensor(name, device)


def decode_smashed(
    frame: Frame,
    settings: ModelPlan,
    limits: FrameLimits,
    device: torch.device | str = "cpu",
    max_samples: int | None = None,
) -> Tensor:
    """Decode finite smashed data [B, T, D] of a shape that the run's body takes.

    T counts the tokens that leave the head, prompts included if they join at the input.

    Args:
        limits: bound the decoded size as well as the encoded one.
        device: where the tensor is decoded.
        max_samples: of a training step; None: unlimited.

    Raises:
        MalformedFrame, WrongShape, TooLarge, NonFinite
        InvalidField: more than ``max_samples`` samples, or an unsuitable codec.
    """
    prompts = settings.prompt_count if settings.prompt_at == "input" else 0
    sizes = anatomy(settings)
    shape = sizes.tokens + prompts, sizes.width
    return _decode_tokens(frame, "smashed", limits, shape, device, max_samples)


def decode_gradients(
    frame: Frame,
    settings: ModelPlan,
    limits: FrameLimits,
    device: torch.device | str,
    num_tokens: int | None,
    max_samples: int,
) -> Tensor:
    """Decode the finite gradient [B, T', D] of the features that the run returns.

    T' is ``num_tokens``; None: all tokens, prompts included. With ``depths`` it is [B, 1, r].

    Raises:
        MalformedFrame, WrongShape, TooLarge, NonFinite, InvalidField: as in `decode_smashed`.
    """
    width = anatomy(settings).width
    if settings.depths:
        num_tokens, width = feature_shape(settings)
    elif num_tokens is None:
        num_tokens = anatomy(settings).tokens + settings.prompt_count
    shape = num_tokens, width
    return _decode_tokens(frame, "gradients", limits, shape, device, max_samples)


def _decode_tokens(
    frame: Frame,
    name: str,
    limits: FrameLimits,
    sample: tuple[int, int],
    device: torch.device | str,
    max_samples: int | None,
) -> Tensor:
    shape = list(frame.spec(name).shape)
    if len(shape) != 3 or shape[0] < 1 or shape[1:] != list(sample):
        raise WrongShape(
            "a tensor of the split plane is [samples, tokens, width]",
            field=name,
            limit=["at least 1", *sample],
            value=shape,
        )
    check_batch_size(shape[0], max_samples, name)
    check_decoded_size(math.prod(shape), name, limits)
    decoded = decode_tensor(frame, name, device)
    require_finite({name: decoded})
    return decoded


def check_decoded_size(elements: int, name: str, limits: FrameLimits) -> None:
    """Refuse a tensor that is small on the wire and too large in memory.

    Raises:
        TooLarge: in float32 it exceeds the limit of one frame.
    """
    limit, nbytes = limits.max_frame_bytes, elements * FLOAT32_BYTES
    if nbytes > limit:
        raise TooLarge(
            "a tensor is too large once it is decoded",
            field=name,
            limit=limit,
            value=nbytes,
            hint="send fewer samples in a request",
        )


def check_batch_size(samples: int, max_samples: int | None, name: str) -> None:
    """Refuse a training step with more samples than the run's batch size.

    Raises:
        InvalidField: there are more.
    """
    if max_samples is not None and samples > max_samples:
        raise InvalidField(
            "a training step contains at most batch_size samples",
            field=name,
            limit=max_samples,
            value=samples,
        )
