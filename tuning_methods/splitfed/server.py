"""The server's side of SplitFed; with tune = full, it tunes a body for each participant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from protocol.errors import InvalidField
from protocol.messages import BodyStepMeta, parse_message
from protocol.plan import RunPlan
from split_model.checkpoints.state import BODY, state_shapes
from split_server.engine.api import InferJob
from split_server.engine.handler import HandlerFactory
from split_server.http.handlers import (
    Handler,
    HandlerContext,
    Reply,
    Submit,
    handle_backward,
    handle_forward,
    handle_infer,
    load_batch,
    server_state_file,
    submit,
)
from split_server.method import ServerMethod
from split_server.models.body_key import BodyKey
from split_server.payloads.requests import (
    SplitRequest,
    decode_batch,
    decode_batch_gradients,
    parse_infer,
    refuse_sample_ids,
)
from tuning_methods.splitfed.tuned_bodies import BodyJob, BodyPlan, Direction, TunedBodies


class SplitFedServer(ServerMethod):
    """A frozen body for all participants (tune = linear), or a tuned one for each (full).

    Source: SplitFed (arXiv 2004.12088).
    """

    job_handlers: ClassVar[Sequence[HandlerFactory]] = (TunedBodies,)

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {"forward": _handle_forward, "backward": _handle_backward, "infer": _handle_infer}

    def has_tuned_bodies(self, plan: RunPlan) -> bool:
        return plan.model.tune_body


def _handle_forward(context: HandlerContext, request: SplitRequest) -> Submit | Reply:
    """Run a batch forward through the participant's body."""
    if not request.plan.model.tune_body:
        return handle_forward(context, request)
    meta = parse_body_step_meta(request)
    refuse_sample_ids(request)
    job = _body_job("forward", context, request, meta, decode_batch(request))
    compute = partial(context.services.engine.submit, job)
    return submit(compute, "features", request.plan.wire.features, meta)


def _handle_backward(context: HandlerContext, request: SplitRequest) -> Submit | Reply:
    """Tune the participant's body; return the gradient of the smashed data."""
    if not request.plan.model.tune_body:
        return handle_backward(context, request)
    meta = parse_body_step_meta(request)
    job = _body_job("backward", context, request, meta, decode_batch_gradients(request))
    compute = partial(context.services.engine.submit, job)
    return submit(compute, "gradients", request.plan.wire.gradients, meta)


def _handle_infer(context: HandlerContext, request: SplitRequest) -> Submit | Reply:
    """Run a batch forward through the body of the newest global state."""
    if not request.plan.model.tune_body:
        return handle_infer(context, request)
    infer = parse_infer(request)
    smashed = load_batch(context, request, infer.batch)
    if isinstance(smashed, Reply):
        return smashed
    body = _newest_body(context)
    job = InferJob(request.run, request.participant, body, smashed, None, request.num_tokens)
    compute = partial(context.services.engine.infer, job)
    return submit(compute, "features", request.plan.wire.inference, infer.meta)


def parse_body_step_meta(request: SplitRequest) -> BodyStepMeta:
    """Parse the meta of a step through the participant's tuned body.

    Raises:
        InvalidField: a field is missing or wrong.
        RunClosed: the run has ended.
        StaleRound: the round is not open, or the participant's update was counted.
    """
    meta = parse_message(BodyStepMeta, dict(request.frame.meta))
    request.permission.require_pending_update(meta.round, meta.attempt)
    return meta


def _body_job(
    direction: Direction,
    context: HandlerContext,
    request: SplitRequest,
    meta: BodyStepMeta,
    tensor: Tensor,
) -> BodyJob:
    plan = request.plan
    shapes = state_shapes(plan.model)
    return BodyJob(
        direction=direction,
        run=request.run,
        participant=request.participant,
        session=meta.session,
        number=meta.number,
        steps=meta.steps,
        body=_newest_body(context),
        plan=BodyPlan(
            training=plan.training,
            rounds=plan.federation.rounds,
            round=meta.round,
            num_parameters=sum(math.prod(shapes[name]) for name in shapes if name.startswith(BODY)),
        ),
        tensor=tensor,
        fingerprint=request.fingerprint,
        num_tokens=request.num_tokens,
    )


def _newest_body(context: HandlerContext) -> BodyKey:
    """Return the key of the body in the newest global state.

    Raises:
        InvalidField: the run does not tune its body.
    """
    if context.run.state.server is None:
        raise InvalidField("this run does not tune its body", field="tune_body", limit=True)
    return replace(context.run.body, state=server_state_file(context))
