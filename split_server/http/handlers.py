"""What can be asked on the split plane: a function for each kind of request.

Each runs on a thread of its own, off the event loop: it decodes and checks, and returns either the
answer or what is to be awaited for it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protocol.errors import InvalidField, MalformedFrame, StaleRound
from protocol.frames import Frame
from protocol.limits import FrameLimits
from protocol.messages import (
    BlobRef,
    BodyStepMeta,
    ExchangeMeta,
    InferMeta,
    SamplesMeta,
    StepMeta,
    parse_message,
)
from protocol.plan import WirePlan
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
)
from split_model import BODY, SplitSettings, anatomy, needed_tokens, state_shapes
from split_server.engine.api import (
    BackwardJob,
    ExchangeJob,
    ForwardJob,
    InferJob,
    SessionPlan,
    StepKey,
)
from split_server.engine.engine import Engine
from split_server.engine.tuned_bodies import BodyJob, BodyPlan, Direction
from split_server.federation import rounds
from split_server.federation.snapshot import Member, RunSnapshot
from split_server.models.body_key import BodyKey
from split_server.payloads.deltas import read_revision, rebuild
from split_server.payloads.samples import read_ids, read_kept, read_rows
from split_server.payloads.tensors import (
    check_batch,
    check_decoded,
    read_gradients,
    read_smashed,
    require_finite,
)
from split_server.storage.run_files import RunFiles, read_prompts
from split_server.storage.sample_store import Owner, SampleStore


@dataclass(frozen=True)
class SplitRequest:
    """A request as it came: by whom, and its frame."""

    run: RunSnapshot
    member: Member
    frame: Frame
    fingerprint: int  # tells a repeat from another request under the same name

    @property
    def owner(self) -> Owner:
        return Owner(self.run.id, self.member.id)

    @property
    def body(self) -> BodyKey:
        return self.run.body

    @property
    def wire(self) -> WirePlan:
        return self.run.plan.wire

    @property
    def tunes_body(self) -> bool:
        return self.run.plan.model.tune_body

    @cached_property
    def num_tokens(self) -> int | None:
        """How many tokens of the features the run wants back; None: all."""
        if not self.run.plan.wire.pooled_features:
            return None
        return needed_tokens(SplitSettings.of(self.run.plan.model))


def require_placement(asked: SplitRequest, placement: str) -> None:
    """Refuse a request that is for runs whose prompts join elsewhere.

    Raises:
        InvalidField
    """
    if asked.run.plan.model.prompt_at != placement:
        raise InvalidField(
            "this request is for runs whose prompts join elsewhere",
            field="prompt_at",
            limit=placement,
            value=asked.run.plan.model.prompt_at,
        )


def require_copies(asked: SplitRequest) -> None:
    """Refuse changes where the server keeps nothing that they could change.

    Raises:
        InvalidField
    """
    if asked.wire.delta_smashed is None:
        raise InvalidField(
            "the server keeps no copies of this run's smashed data",
            field="delta_smashed",
            limit="a codec",
        )


def require_kept(asked: SplitRequest) -> None:
    """Refuse ids where the server keeps no smashed data.

    Raises:
        InvalidField
    """
    if not asked.run.plan.wire.keep_smashed:
        raise InvalidField(
            "the server keeps no smashed data of this run", field="keep_smashed", limit=True
        )


def require_tensors(asked: SplitRequest, meta: ExchangeMeta) -> None:
    """Refuse tensors for which an exchange of this number has no use.

    Raises:
        MalformedFrame
    """
    brought = set(asked.frame.specs)
    wanted = {"gradients"} if meta.number > 0 else set()
    batch = {"ids", "smashed"} & brought if meta.number < meta.steps else set()
    if brought != wanted | batch or len(batch) > 1:
        raise MalformedFrame(
            "an exchange brings gradients (but the first) and ids or smashed (but the last)",
            field="tensors",
            limit=sorted(wanted | {"ids"}) if meta.number < meta.steps else sorted(wanted),
            value=sorted(brought),
        )


@dataclass(frozen=True)
class Reply:
    """An answer that is not encoded yet."""

    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Tensor, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class HandlerContext:
    """What the requests work with."""

    engine: Engine
    samples: SampleStore
    device: torch.device  # tensors are decoded there
    files: Callable[[str], RunFiles]  # of a run
    limits: FrameLimits


Work = Callable[[], Awaitable[Reply]]

Handler = Callable[[HandlerContext, SplitRequest], Work | Reply]


def handle_forward(desk: HandlerContext, asked: SplitRequest) -> Work | Reply:
    """Smashed data in, or their changes; features out; it is kept where a backward follows."""
    if asked.tunes_body:
        return _body_forward(desk, asked)
    meta = _training_step(asked)
    smashed = _renewed(desk, asked) if "ids" in asked.frame.specs else _sent(desk, asked)
    if isinstance(smashed, list):
        return _missing(smashed)
    key = StepKey(asked.run.id, asked.member.id, meta.step)
    backward = asked.body.settings.tunes_ahead
    job = ForwardJob(key, asked.body, smashed, asked.fingerprint, asked.num_tokens, backward)
    return _work(partial(desk.engine.submit, job), "features", asked.wire.features, meta)


def handle_backward(desk: HandlerContext, asked: SplitRequest) -> Work:
    """The gradient of a step's features in, that of its smashed data out."""
    if asked.tunes_body:
        return _body_backward(desk, asked)
    meta = _training_step(asked)
    key = StepKey(asked.run.id, asked.member.id, meta.step)
    job = BackwardJob(key, asked.body, _gradients(desk, asked), asked.fingerprint)
    return _work(partial(desk.engine.submit, job), "gradients", asked.wire.gradients, meta)


def handle_exchange(desk: HandlerContext, asked: SplitRequest) -> Work | Reply:
    """The gradients of one batch in and the features of the next out; prompts are tuned here."""
    meta = parse_message(ExchangeMeta, dict(asked.frame.meta))
    require_placement(asked, "cut")
    rounds.require_trainer(asked.run, asked.member, meta.round, meta.attempt)
    require_tensors(asked, meta)
    gradients, smashed = None, None
    if meta.number > 0:
        gradients = _gradients(desk, asked)
    if meta.number < meta.steps:
        found = _smashed(desk, asked, asked.run.plan.training.batch_size)
        if isinstance(found, Reply):
            return found
        smashed = found
    job = ExchangeJob(
        run=asked.run.id,
        participant=asked.member.id,
        session=meta.session,
        number=meta.number,
        steps=meta.steps,
        body=asked.body,
        plan=_plan(desk, asked, meta.round),
        gradients=gradients,
        smashed=smashed,
        fingerprint=asked.fingerprint,
        num_tokens=asked.num_tokens,
    )
    return _work(partial(desk.engine.submit, job), "features", asked.wire.features, meta)


def handle_infer(desk: HandlerContext, asked: SplitRequest) -> Work | Reply:
    """Smashed data in, features out; nothing is kept for a backward."""
    meta = parse_message(InferMeta, dict(asked.frame.meta))
    if meta.state not in (None, asked.run.state.sha256):
        raise StaleRound(
            "there is a newer global state; its tail belongs to these prompts",
            field="state",
            limit=asked.run.state.sha256,
            value=meta.state,
        )
    found = _smashed(desk, asked)
    if isinstance(found, Reply):
        return found
    prompts, body = None, asked.body
    if asked.tunes_body:
        body = _tuned_body(desk, asked)
    elif (held := asked.run.held) is not None:
        prompts = read_prompts(_held_file(desk, asked, held))
    job = InferJob(asked.run.id, asked.member.id, body, found, prompts, asked.num_tokens)
    return _work(partial(desk.engine.infer, job), "features", asked.wire.inference, meta)


def handle_samples(desk: HandlerContext, asked: SplitRequest) -> Reply:
    """Smashed data in, to be kept under the ids that came with them."""
    parse_message(SamplesMeta, dict(asked.frame.meta))
    require_kept(asked)
    rounds.require_running(asked.run)
    ids, form, buffers = read_rows(asked.frame, asked.body.settings, desk.limits)
    desk.samples.put(asked.owner, form, ids, buffers)
    return Reply("kept")


def handle_missing(desk: HandlerContext, asked: SplitRequest) -> Reply:
    """Ids in, the places of those out whose samples are not kept."""
    parse_message(SamplesMeta, dict(asked.frame.meta))
    require_kept(asked)
    return _missing(desk.samples.list_missing(asked.owner, read_ids(asked.frame)))


HANDLERS: Final[Mapping[str, tuple[str, Handler]]] = {  # by path: the frame's kind, who reads it
    FORWARD_PATH: ("forward", handle_forward),
    BACKWARD_PATH: ("backward", handle_backward),
    EXCHANGE_PATH: ("exchange", handle_exchange),
    INFER_PATH: ("infer", handle_infer),
    SAMPLES_PATH: ("samples", handle_samples),
    MISSING_PATH: ("missing", handle_missing),
}


def _work(
    compute: Callable[[], Awaitable[Tensor]],
    name: str,
    codec: str,
    meta: StepMeta | BodyStepMeta | ExchangeMeta,
) -> Work:
    async def work() -> Reply:
        answer = await compute()
        tensors = {name: (answer, codec)} if answer.numel() else {}
        return Reply(name, meta.model_dump(), tensors)

    return work


def _training_step(asked: SplitRequest) -> StepMeta:
    meta = parse_message(StepMeta, dict(asked.frame.meta))
    require_placement(asked, "input")
    rounds.require_trainer(asked.run, asked.member, meta.round, None)
    return meta


def _body_forward(desk: HandlerContext, asked: SplitRequest) -> Work:
    meta = _body_step(asked)
    if "ids" in asked.frame.specs:
        require_copies(asked)  # and there are none
    job = _body_job("forward", desk, asked, meta, _sent(desk, asked))
    return _work(partial(desk.engine.submit, job), "features", asked.wire.features, meta)


def _body_backward(desk: HandlerContext, asked: SplitRequest) -> Work:
    meta = _body_step(asked)
    job = _body_job("backward", desk, asked, meta, _gradients(desk, asked))
    return _work(partial(desk.engine.submit, job), "gradients", asked.wire.gradients, meta)


def _body_step(asked: SplitRequest) -> BodyStepMeta:
    meta = parse_message(BodyStepMeta, dict(asked.frame.meta))
    open_round = rounds.require_trainer(asked.run, asked.member, meta.round, meta.attempt)
    if asked.member.id in open_round.updated or asked.member.id in open_round.declined:
        raise StaleRound(
            "this participant's update has been counted", field="round", value=meta.round
        )
    return meta


def _held_file(desk: HandlerContext, asked: SplitRequest, held: BlobRef) -> Path:
    path = desk.files(asked.run.id).server_state(held.sha256)
    if not path.is_file():
        raise StaleRound(
            "there is a newer global state, and this one is gone",
            field="state",
            value=asked.run.state.sha256,
        )
    return path


def _body_job(
    direction: Direction,
    desk: HandlerContext,
    asked: SplitRequest,
    meta: BodyStepMeta,
    tensor: Tensor,
) -> BodyJob:
    settings = asked.run.plan
    shapes = state_shapes(SplitSettings.of(settings.model))
    plan = BodyPlan(
        training=settings.training,
        rounds=settings.federation.rounds,
        round=meta.round,
        numbers=sum(math.prod(shapes[name]) for name in shapes if name.startswith(BODY)),
    )
    return BodyJob(
        direction=direction,
        run=asked.run.id,
        participant=asked.member.id,
        session=meta.session,
        number=meta.number,
        steps=meta.steps,
        body=_tuned_body(desk, asked),
        plan=plan,
        tensor=tensor,
        fingerprint=asked.fingerprint,
        num_tokens=asked.num_tokens,
    )


def _tuned_body(desk: HandlerContext, asked: SplitRequest) -> BodyKey:
    """The body of the newest global state."""
    held = asked.run.held
    if held is None:
        raise InvalidField("this run has no body of its own", field="tune_body", limit=True)
    return replace(asked.body, state=_held_file(desk, asked, held))


def _gradients(desk: HandlerContext, asked: SplitRequest) -> Tensor:
    most, settings = asked.run.plan.training.batch_size, asked.body.settings
    found = read_gradients(asked.frame, settings, desk.limits, desk.device, asked.num_tokens, most)
    require_finite({"gradients": found})
    return found


def _sent(desk: HandlerContext, asked: SplitRequest) -> Tensor:
    most = asked.run.plan.training.batch_size
    return _received(desk, asked, most)


def _renewed(desk: HandlerContext, asked: SplitRequest) -> Tensor | list[int]:
    """Smashed data [B, T, D] made of what is kept and its changes; or the places of what is not.

    Made on the CPU wherever the body runs: the device does the same sums, and no bit may differ.
    """
    require_copies(asked)
    most = asked.run.plan.training.batch_size
    revision = read_revision(asked.frame, asked.body.settings, desk.limits, most)
    found = rebuild(desk.samples, asked.owner, revision)
    return found if isinstance(found, list) else found.to(desk.device)


def _received(desk: HandlerContext, asked: SplitRequest, most: int | None) -> Tensor:
    found = read_smashed(asked.frame, asked.body.settings, desk.limits, desk.device, most)
    require_finite({"smashed": found})
    return found


def _smashed(desk: HandlerContext, asked: SplitRequest, most: int | None = None) -> Tensor | Reply:
    """Smashed data [B, T, D] that came with the request, or are kept; or what is missing."""
    if "ids" not in asked.frame.specs:
        return _received(desk, asked, most)
    require_kept(asked)
    if "smashed" in asked.frame.specs:
        raise MalformedFrame(
            "a batch is named by its ids or sent as it is, and not both",
            field="tensors",
            limit=["ids"],
            value=sorted(asked.frame.specs),
        )
    ids = read_ids(asked.frame)
    check_batch(len(ids), most, "ids")
    sizes = anatomy(asked.body.settings)
    check_decoded(len(ids) * sizes.tokens * sizes.width, "ids", desk.limits)
    found = desk.samples.take(asked.owner, ids)
    return _missing(found) if isinstance(found, list) else read_kept(*found, desk.device)


def _missing(places: list[int]) -> Reply:
    return Reply("missing", tensors={"places": (torch.tensor(places, dtype=torch.int64), "int64")})


def _plan(desk: HandlerContext, asked: SplitRequest, round_: int) -> SessionPlan:
    settings, held = asked.run.plan, asked.run.held
    if held is None:
        raise InvalidField(
            "this run has no prompts to tune", field="prompt_count", limit=1, value=0
        )
    return SessionPlan(
        training=settings.training,
        rounds=settings.federation.rounds,
        round=round_,
        initial=partial(read_prompts, _held_file(desk, asked, held)),
        from_mean_token=round_ == 1 and settings.model.prompt_init == "mean-token",
    )
