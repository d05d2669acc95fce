"""Valid frames of every codec and kind, and valid messages of every type: what is mutated."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from protocol.base import Message
from protocol.codec_names import LOSSLESS_SUFFIX
from protocol.errors import Busy
from protocol.frames import encode_frame, join_frame
from protocol.messages import (
    Assignment,
    BlobRef,
    BodyStepMeta,
    EvaluationReport,
    Event,
    ExchangeMeta,
    InferMeta,
    JoinRequest,
    JoinResponse,
    ParticipantView,
    Results,
    RoundStatus,
    RoundView,
    RunStatus,
    RunView,
    SamplesMeta,
    StartMeta,
    StepMeta,
    Task,
    UpdateMeta,
    UpdateReceipt,
)
from protocol.plan import RunPlan
from protocol.quality import CONFIDENCE_BINS, ConfidenceBin, PredictionCounts
from protocol.settings import RunSettings
from sfprompt_bench.presets import preset_named

_LOSSY: Final = (
    "int8",
    "int4",
    "int4-asym",
    "pq",
    "topk:0.05",
    "topk:1.0",
    "cosine:2",
    "cosine:4",
    "cosine:8",
    "svd:0.9",
    "svd:1",
    "klt:0.5",
    "klt:2",
)

_PLAIN: Final = ("float32", "float16", "bfloat16", "int64", "uint8")

CODECS: Final = tuple(
    name + suffix for name in (*_PLAIN, *_LOSSY) for suffix in ("", LOSSLESS_SUFFIX)
)

_SHAPES: Final = ((2, 5, 16), (40, 4), (3, 67), (), (0, 4), (4, 2, 8), (36, 2, 2), (64, 24))

_HASH: Final = "0123456789abcdef" * 4

_BLOB: Final = BlobRef(sha256=_HASH, nbytes=1)

# Meta of each kind of frame, and the type that parses it; None: a response without one of its own.
METAS: Final[Mapping[str, tuple[type[Message] | None, dict[str, Any]]]] = {
    "forward": (StepMeta, {"step": "s", "round": 1}),
    "backward": (
        BodyStepMeta,
        {"session": "s", "round": 1, "attempt": 0, "number": 1, "steps": 4},
    ),
    "exchange": (
        ExchangeMeta,
        {"session": "s", "round": 1, "attempt": 0, "number": 0, "steps": 3},
    ),
    "infer": (InferMeta, {"step": "s", "round": 1, "state": _HASH}),
    "samples": (SamplesMeta, {}),
    "missing": (SamplesMeta, {}),
    "start": (StartMeta, {"round": 0, "attempt": 0}),
    "solve": (StartMeta, {"round": 0, "attempt": 0}),
    "update": (
        UpdateMeta,
        {
            "round": 1,
            "attempt": 0,
            "samples": 9,
            "base": _HASH,
            "session": "s",
            "train_loss": 0.5,
            "local_loss": None,
        },
    ),
    "features": (StepMeta, {"step": "s", "round": 1}),
    "gradients": (StepMeta, {"step": "s", "round": 1}),
    "kept": (SamplesMeta, {}),
    "logits": (InferMeta, {"step": "s", "round": 1}),
    "delta": (None, {"base": _HASH}),
}


@dataclass(frozen=True)
class ValidFrame:
    """A frame that decodes.

    Attributes:
        kind: of the frame.
        codecs: of its tensors.
        data: its bytes.
    """

    kind: str
    codecs: tuple[str, ...]
    data: bytes


@cache
def valid_frames() -> tuple[ValidFrame, ...]:
    """Encode a frame for each kind and codec, with tensors of different shapes."""
    draws = random.Random(0)  # noqa: S311 - nothing secret
    generator = torch.Generator().manual_seed(0)
    frames = []
    for kind, (_, meta) in METAS.items():
        for codec in CODECS:
            others = [codec, draws.choice(CODECS)][: draws.randint(1, 2)]
            tensors = {
                f"tensor-{number}": (_tensor(draws.choice(_SHAPES), name, generator), name)
                for number, name in enumerate(others)
            }
            data = bytes(join_frame(encode_frame(kind, meta, tensors)))
            frames.append(ValidFrame(kind, tuple(others), data))
        frames.append(ValidFrame(kind, (), bytes(join_frame(encode_frame(kind, meta, {})))))
    return tuple(frames)


def _tensor(shape: tuple[int, ...], codec: str, generator: torch.Generator) -> Tensor:
    if codec.startswith(("int64", "uint8")):
        dtype = torch.int64 if codec.startswith("int64") else torch.uint8
        return torch.randint(0, 100, shape, generator=generator, dtype=dtype)
    plain = torch.randn(shape, generator=generator)
    if len(shape) > 1 and plain.numel():  # of low rank: transforms make it smaller
        rows = torch.randn((shape[0], 1), generator=generator)
        plain = (rows @ torch.randn((1, plain.numel() // shape[0]), generator=generator)).reshape(
            shape
        )
    return plain


@cache
def valid_messages() -> tuple[tuple[type[Message], str], ...]:
    """Write a message of each type as JSON."""
    messages: list[Message] = [*_views(), *_small_messages()]
    for form in ("default", "paper"):
        settings = preset_named("digits", form).settings
        messages += [settings, settings.plan]
    metas = [(kind, meta) for kind, meta in METAS.values() if kind is not None]
    messages += [kind.model_validate(meta) for kind, meta in metas]
    return tuple((type(message), message.model_dump_json()) for message in messages)


def _small_messages() -> list[Message]:
    return [
        JoinRequest(
            name="a", train_samples=9, test_samples=3, num_classes=10, classes_sha256=_HASH
        ),
        UpdateReceipt(round=1, samples=9),
        EvaluationReport(round=1, attempt=0, samples=9, correct=4, loss_sum=2.5),
        EvaluationReport(
            round=1,
            attempt=0,
            samples=2,
            correct=1,
            loss_sum=0.5,
            predictions=PredictionCounts(
                confusion=((0, 0, 1), (0, 1, 1)),
                bins=(
                    *[ConfidenceBin()] * (CONFIDENCE_BINS - 1),
                    ConfidenceBin(samples=2, correct=1, confidence_sum=1.9),
                ),
            ),
        ),
        Event(seq=1, at=1.5, kind="run_created", data={"a": [1, {"b": None}]}),
        Assignment(
            task=Task.TRAIN,
            round=1,
            state=_BLOB,
            remaining_s=1.5,
            status=RunStatus.RUNNING,
            head=_BLOB,
            start=0,
        ),
        RunPlan(),
        RunSettings(),
    ]


def _views() -> list[Message]:
    settings = preset_named("digits", "default").settings
    run = RunView(
        id="calm-otter-2345",
        status=RunStatus.RUNNING,
        settings=settings,
        plan=settings.plan,
        round=1,
        participants=1,
        created_at=1.5,
        backbone_bytes=1,
        head=_BLOB,
        state=_BLOB,
    )
    traffic = {"smashed": {"up": 1, "down": 0}}
    round_ = RoundView(
        round=1,
        attempt=0,
        status=RoundStatus.CLOSED,
        opened_at=1.5,
        sampled=("p0001",),
        updated=("p0001",),
        train_loss=0.5,
        traffic=traffic,
        state=_BLOB,
    )
    participant = ParticipantView(
        id="p0001", name="a", train_samples=9, test_samples=3, joined_at=1.5, traffic=traffic
    )
    return [
        run,
        JoinResponse(participant="p0001", credential="sfp1.r.p.0", run=run),
        Results(run=run, rounds=(round_,), participants=(participant,), traffic=traffic),
    ]


@cache
def valid_error() -> str:
    """Write a typed error as JSON."""
    return json.dumps(
        Busy("full", field="queue_mib", limit=[1], value=2, retry_after_s=1).to_wire()
    )
