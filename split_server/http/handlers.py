"""The handlers of the split plane, one for each kind of request.

A handler runs on a codec thread, or on the event loop if the request is light. It parses the
request and returns the reply, or a function that submits the request to the engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protocol.base import Message
from protocol.errors import InvalidField, StaleRound
from protocol.messages import StepMeta
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
)
from split_model.backbone.architecture import anatomy
from split_model.optimizer import scale_rates
from split_server.closed_form.basis import Basis, read_basis
from split_server.engine.api import (
    BackwardJob,
    ExchangeJob,
    ForwardJob,
    InferJob,
    SessionPlan,
    StepKey,
)
from split_server.federation.snapshot import RunSnapshot
from split_server.http.services import Services
from split_server.payloads.requests import (
    Batch,
    SplitRequest,
    parse_backward,
    parse_exchange,
    parse_forward,
    parse_infer,
    parse_missing,
    parse_samples,
)
from split_server.payloads.samples import decode_cached
from split_server.runtime.aio import run_on
from split_server.runtime.device import used_here
from split_server.storage.run_files import read_linear_tail, read_prompts
from split_server.storage.sample_store import Owner


@dataclass(frozen=True)
class HandlerContext:
    """The run of a request, and the server's services."""

    services: Services
    run: RunSnapshot


@dataclass(frozen=True)
class Reply:
    """A reply that is not encoded yet."""

    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Tensor, str]] = field(default_factory=dict)


Compute = Callable[[], Awaitable[Tensor]]

Submit = Callable[[], Awaitable[Reply]]

Handler = Callable[[HandlerContext, SplitRequest], Submit | Reply]


def handle_forward(context: HandlerContext, request: SplitRequest) -> Submit:
    """Run the forward pass of a step; the engine retains the step if a backward may follow."""
    forward = parse_forward(request)
    return submit_forward(context, request, forward.meta, forward.smashed)


def submit_forward(
    context: HandlerContext, request: SplitRequest, meta: StepMeta, smashed: Tensor
) -> Submit:
    """Return the function that runs the forward pass of a step.

    Args:
        context: context of the request.
        request: the request.
        meta: meta part of the step.
        smashed: smashed data of the step, [B, T, D].
    """
    job = ForwardJob(
        key=StepKey(request.run, request.participant, meta.step),
        body=request.body,
        smashed=smashed,
        fingerprint=request.fingerprint,
        num_tokens=request.num_tokens,
        backward=request.body.settings.tunes_ahead,
    )
    compute = partial(context.services.engine.submit, job)
    return submit(compute, "features", request.plan.wire.features, meta)


def handle_backward(context: HandlerContext, request: SplitRequest) -> Submit:
    """Compute the gradient of a step's smashed data from the gradient of its features."""
    backward = parse_backward(request)
    job = BackwardJob(
        key=StepKey(request.run, request.participant, backward.meta.step),
        body=request.body,
        gradients=backward.gradients,
        fingerprint=request.fingerprint,
    )
    compute = partial(context.services.engine.submit, job)
    return submit(compute, "gradients", request.plan.wire.gradients, backward.meta)


def handle_exchange(context: HandlerContext, request: SplitRequest) -> Submit | Reply:
    """Tune a session's prompts with the gradients of a batch; run the next batch forward."""
    exchange = parse_exchange(request)
    smashed = None
    if exchange.batch is not None:
        loaded = load_batch(context, request, exchange.batch)
        if isinstance(loaded, Reply):
            return loaded
        smashed = loaded
    meta, basis, gradients = exchange.meta, find_basis(context), exchange.gradients
    if basis is not None and gradients is not None:
        gradients = basis.project_back(gradients, anatomy(request.plan.model).width)
    job = ExchangeJob(
        run=request.run,
        participant=request.participant,
        session=meta.session,
        number=meta.number,
        steps=meta.steps,
        body=request.body,
        plan=_session_plan(context, meta.round),
        gradients=gradients,
        smashed=smashed,
        fingerprint=request.fingerprint,
        num_tokens=request.num_tokens,
    )
    compute: Compute = partial(context.services.engine.submit, job)
    if basis is not None:
        compute = followed_by(context, compute, basis.project)
    return submit(compute, "features", request.plan.wire.features, meta)


def handle_infer(context: HandlerContext, request: SplitRequest) -> Submit | Reply:
    """Run a batch forward with the newest global state; retain nothing."""
    infer = parse_infer(request)
    smashed = load_batch(context, request, infer.batch)
    if isinstance(smashed, Reply):
        return smashed
    prompts = None
    if context.run.state.server is not None:
        prompts = read_prompts(server_state_file(context))
    job = InferJob(
        request.run, request.participant, request.body, smashed, prompts, request.num_tokens
    )
    compute = partial(context.services.engine.infer, job)
    codec = request.plan.wire.inference
    basis = find_basis(context)
    if basis is None:
        return submit(compute, "features", codec, infer.meta)
    classify = partial(classify_features, basis, device_state_file(context))
    return submit(followed_by(context, compute, classify), "logits", codec, infer.meta)


def handle_samples(context: HandlerContext, request: SplitRequest) -> Reply:
    """Cache smashed data under the ids in the request."""
    samples = parse_samples(request).samples
    context.services.samples.put(owner_of(request), samples.form, samples.ids, samples.buffers)
    return Reply("kept")


def handle_missing(context: HandlerContext, request: SplitRequest) -> Reply:
    """Reply with the positions of the ids whose samples are not cached."""
    ids = parse_missing(request).ids
    return missing_reply(context.services.samples.list_missing(owner_of(request), ids))


HANDLERS: Final[Mapping[str, tuple[str, Handler]]] = {  # path: kind of the frame, handler
    FORWARD_PATH: ("forward", handle_forward),
    BACKWARD_PATH: ("backward", handle_backward),
    EXCHANGE_PATH: ("exchange", handle_exchange),
    INFER_PATH: ("infer", handle_infer),
    SAMPLES_PATH: ("samples", handle_samples),
    MISSING_PATH: ("missing", handle_missing),
}


def submit(compute: Compute, name: str, codec: str, meta: Message) -> Submit:
    """Return the function that runs a computation and makes a reply of its result.

    Args:
        compute: the computation; an empty result is not sent.
        name: name of the result and kind of the reply.
        codec: codec of the result.
        meta: meta part of the reply.
    """

    async def reply() -> Reply:
        result = await compute()
        tensors = {name: (result, codec)} if result.numel() else {}
        return Reply(name, meta.model_dump(), tensors)

    return reply


def followed_by(
    context: HandlerContext, compute: Compute, function: Callable[[Tensor], Tensor]
) -> Compute:
    """Return a computation whose result, unless it is empty, passes through a function.

    Args:
        context: context of the request.
        compute: the first computation.
        function: runs on a codec thread.
    """

    def call(result: Tensor) -> Tensor:
        with context.services.codec_streams.use():
            return function(used_here(result))

    async def compute_both() -> Tensor:
        result = await compute()
        if not result.numel():
            return result
        return await run_on(context.services.codec_threads, partial(call, result))

    return compute_both


def find_basis(context: HandlerContext) -> Basis | None:
    """Return the basis of a run's features on the server's device; None: the run has none.

    Raises:
        NotFound: round 0 has no result yet.
    """
    if not context.run.plan.model.depths:
        return None
    path = context.run.basis_file(context.services.runs.files(context.run.id))
    return read_basis(path, context.services.placement.device)


def classify_features(basis: Basis, state: Path, tokens: Tensor) -> Tensor:
    """Compute logits with the linear tail of a state.

    Args:
        basis: basis of the features.
        state: file of the state's device part.
        tokens: tokens that the tail reads, [B, R, D].

    Returns:
        The logits, [B, C].
    """
    weight, bias = read_linear_tail(state, tokens.device)
    return basis.project(tokens).flatten(1) @ weight.T + bias


def load_batch(context: HandlerContext, request: SplitRequest, batch: Batch) -> Tensor | Reply:
    """Return a batch's smashed data [B, T, D], or the reply that names its missing samples."""
    if isinstance(batch, Tensor):
        return batch
    cached = context.services.samples.take(owner_of(request), batch.ids)
    return (
        missing_reply(cached)
        if isinstance(cached, list)
        else decode_cached(*cached, request.device)
    )


def missing_reply(indices: list[int]) -> Reply:
    """Return the reply that names the missing samples by their indices in the request."""
    places = torch.tensor(indices, dtype=torch.int64)
    return Reply("missing", tensors={"places": (places, "int64")})


def owner_of(request: SplitRequest) -> Owner:
    """Return the owner of a request's samples in the sample store."""
    return Owner(request.run, request.participant)


def _session_plan(context: HandlerContext, round_: int) -> SessionPlan:
    plan = context.run.plan
    if context.run.state.server is None:
        raise InvalidField(
            "this run has no prompts to tune", field="prompt_count", limit=1, value=0
        )
    return SessionPlan(
        training=scale_rates(plan.training, context.run.rate_scale),
        rounds=plan.federation.rounds,
        round=round_,
        initial=partial(read_prompts, server_state_file(context)),
        from_mean_token=round_ == 1 and plan.model.prompt_init == "mean-token",
    )


def device_state_file(context: HandlerContext) -> Path:
    """Return the file with the device's part of the newest global state."""
    state = context.run.state.device
    return context.services.runs.files(context.run.id).state(state.sha256)


def server_state_file(context: HandlerContext) -> Path:
    """Return the file with the server's part of the newest global state.

    Raises:
        StaleRound: a newer global state has replaced it.
    """
    state, files = context.run.state, context.services.runs.files(context.run.id)
    path = None if state.server is None else files.server_state(state.server.sha256)
    if path is None or not path.is_file():
        raise StaleRound(
            "this global state was replaced by a newer one; fetch the newest",
            field="state",
            value=state.device.sha256,
        )
    return path
