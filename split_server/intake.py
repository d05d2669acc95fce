"""Judges an update before it may count."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

import split_model
from protocol.codecs import codec_named
from protocol.errors import EmptyUpdate, InvalidField, NonFinite, WrongShape
from protocol.frames import Frame
from protocol.messages import BlobRef, EvaluationReport, UpdateMeta
from protocol.settings import BackboneSettings
from split_model import SplitSettings
from split_server.snapshot import Member


@lru_cache(maxsize=64)
def _shapes(model: BackboneSettings) -> Mapping[str, tuple[int, ...]]:
    return split_model.device_shapes(SplitSettings.of(model))


def check_samples(meta: UpdateMeta, member: Member) -> None:
    """Refuse a weight that the participant cannot have.

    Raises:
        EmptyUpdate: no sample was kept.
        InvalidField: more samples than the participant has.
    """
    if meta.samples == 0:
        raise EmptyUpdate(
            "an update that was trained on no sample is not counted",
            field="samples",
            limit=1,
            value=0,
            hint="wait for the next round",
        )
    if meta.samples > member.train_samples:
        raise InvalidField(
            "an update cannot weigh more than the samples its participant has joined with",
            field="samples",
            limit=member.train_samples,
            value=meta.samples,
        )


def read_update(frame: Frame, model: BackboneSettings) -> dict[str, Tensor]:
    """A device's tensors of an update in float32, if exactly those of the run, and finite.

    Raises:
        WrongShape: a tensor is missing, unknown, or of another shape.
        InvalidField: a codec that carries no floating-point numbers.
        NonFinite: NaN or infinity in a tensor.
    """
    shapes = _shapes(model)
    if set(frame.specs) != set(shapes):
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


def require_base(meta: UpdateMeta, state: BlobRef) -> None:
    """Refuse changes against another state than the round's.

    Raises:
        InvalidField: it is another.
    """
    if meta.base is not None and meta.base != state.sha256:
        raise InvalidField(
            "the changes of an update are against the state that its round began with",
            field="base",
            limit=state.sha256,
            value=meta.base,
        )


def read_floats(frame: Frame, name: str) -> Tensor:
    """One tensor of a frame in float32.

    Raises:
        MalformedFrame: the frame lacks it.
        InvalidField: its codec carries no floating-point numbers.
        NonFinite: it holds NaN or infinity.
    """
    plain = read_tensor(frame, name).to(torch.float32)
    if not bool(torch.isfinite(plain).all()):
        raise NonFinite("a tensor holds NaN or infinity", field=name)
    return plain


def read_tensor(frame: Frame, name: str, device: torch.device | str = "cpu") -> Tensor:
    """One tensor of floating-point numbers, in the dtype of its codec and not yet looked into.

    Raises:
        MalformedFrame: the frame lacks it.
        InvalidField: its codec carries no floating-point numbers.
    """
    tensor = frame.tensor(name, device)
    if not codec_named(frame.specs[name].codec).floating:
        raise InvalidField(
            "this tensor takes a codec of floating-point numbers",
            field=name,
            value=frame.specs[name].codec,
        )
    return tensor


def check_smashed(settings: SplitSettings, smashed: Tensor) -> None:
    """Refuse what no body of these settings takes, before it waits for one.

    Raises:
        WrongShape: not [B, T, D] with at least one sample, the tokens that leave the run's head
            (prompts included, if they join at the input) and the backbone's width.
    """
    inside = settings.prompt_count if settings.prompt_at == "input" else 0
    _check_tokens(settings, smashed, split_model.anatomy(settings).tokens + inside, "smashed")


def check_gradients(settings: SplitSettings, gradients: Tensor, leading: int | None) -> None:
    """Refuse what cannot be the gradient of features that the run hands out.

    Raises:
        WrongShape: not [B, T', D], with the ``leading`` tokens or else all, prompts included.
    """
    tokens = split_model.anatomy(settings).tokens + settings.prompt_count
    _check_tokens(settings, gradients, tokens if leading is None else leading, "gradients")


def _check_tokens(settings: SplitSettings, tensor: Tensor, tokens: int, name: str) -> None:
    sizes = split_model.anatomy(settings)
    shape = list(tensor.shape)
    if len(shape) != 3 or shape[0] < 1 or shape[1:] != [tokens, sizes.width]:
        raise WrongShape(
            "a tensor of the split plane is [samples, tokens, width]",
            field=name,
            limit=["at least 1", tokens, sizes.width],
            value=shape,
        )


def check_batch(tensor: Tensor, most: int, name: str) -> None:
    """Refuse a training step of more samples than a batch of the run.

    Raises:
        InvalidField: there are more.
    """
    if tensor.shape[0] > most:
        raise InvalidField(
            "a training step holds at most batch_size samples",
            field=name,
            limit=most,
            value=int(tensor.shape[0]),
        )


def check_report(report: EvaluationReport, member: Member) -> None:
    """Refuse an evaluation that this participant cannot have made.

    Raises:
        InvalidField: no sample, more samples than it has, or a negative loss.
    """
    if not 1 <= report.samples <= member.test_samples:
        raise InvalidField(
            "an evaluation covers at least one and at most all of the participant's samples",
            field="samples",
            limit=member.test_samples,
            value=report.samples,
        )
    if report.loss_sum < 0:
        raise InvalidField(
            "a sum of losses is not negative", field="loss_sum", limit=0, value=report.loss_sum
        )
