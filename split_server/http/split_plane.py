"""The split plane: raw ASGI, because every microsecond here is paid at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from starlette.types import ASGIApp, Receive, Scope, Send
from xxhash import xxh3_64_intdigest

from protocol.errors import InvalidField, NonFinite
from protocol.frames import decode_frame, encode_frame, frame_length, header_length, require_kind
from protocol.limits import FrameLimits
from protocol.wire import FRAME_MEDIA_TYPE
from split_server.engine.api import Engine
from split_server.engine.requests import as_shown
from split_server.engine.tasks import nbytes_of
from split_server.federation.credentials import require_member
from split_server.federation.liveness import Liveness
from split_server.federation.rounds import SenderPermission
from split_server.federation.service import FederationService
from split_server.federation.snapshot import Member, RunSnapshot
from split_server.http.body import BodyBudget, read_body
from split_server.http.errors import send_pieces
from split_server.http.handlers import HANDLERS, Handler, HandlerContext, Reply, Submit
from split_server.http.middleware import identity_of
from split_server.payloads.requests import SplitRequest
from split_server.runtime.aio import run_on
from split_server.runtime.device import SideStreams, used_here
from split_server.storage.sample_store import SampleStore

_MEDIA = FRAME_MEDIA_TYPE.encode()

# Up to so many bytes, floats that nothing is done to are read and checked in a fifth of a
# millisecond: less than it takes to hand them to a thread and to be woken by it.
_LIGHT_BYTES = 2 * 1024 * 1024

_LIGHT_HEADER_BYTES = 4096  # a larger one is nobody's, and takes its time

_LIGHT_KINDS = frozenset({"forward", "backward"})  # they touch no disk

_RAW = frozenset({"float32", "float16", "bfloat16"})

R = TypeVar("R")


@dataclass(frozen=True)
class SplitPlane:
    """Answers the paths of the split plane and passes all other requests on."""

    app: ASGIApp
    engine: Engine
    samples: SampleStore
    device: torch.device
    federation: FederationService
    liveness: Liveness
    limits: FrameLimits
    body_budget: BodyBudget
    threads: ThreadPoolExecutor  # for decoding and encoding
    streams: SideStreams  # of those threads
    body_timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = HANDLERS.get(scope["path"]) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        await self._answer(*route, scope, receive, send)

    async def _answer(
        self, kind: str, handler: Handler, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["method"] != "POST":
            raise InvalidField(
                "this path accepts POST only", field="method", limit="POST", value=scope["method"]
            )
        identity = require_member(identity_of(scope))
        run, participant = self.federation.member(identity.run, identity.participant)
        self.liveness.touch(run.id, participant.id)
        with self.body_budget.claim() as reservation:
            limit = self.limits.max_frame_bytes
            data = await read_body(scope, receive, limit, self.body_timeout_s, reservation)
            # Again: the run may have changed while the body came in.
            run, participant = self.federation.member(run.id, participant.id)
            handled = await self._handle(kind, handler, run, participant, data)
            del data
            reply = handled if isinstance(handled, Reply) else await handled()
            encode = partial(_encode, reply)
            pieces = encode() if _is_light(reply) else await self._off_loop(encode)
            reservation.hold(frame_length(pieces))
            del handled, reply, encode  # free their tensors before a slow client has read
            await send_pieces(send, 200, _MEDIA, pieces)

    async def _handle(
        self,
        kind: str,
        handler: Handler,
        run: RunSnapshot,
        participant: Member,
        data: bytearray | memoryview,
    ) -> Submit | Reply:
        context = HandlerContext(run, self.engine, self.samples, self.federation.files(run.id))

        def decode() -> SplitRequest:
            frame = decode_frame(data, self.limits)
            require_kind(frame, kind)
            return SplitRequest(
                run=run.id,
                participant=participant.id,
                plan=run.plan,
                body=run.body,
                state=run.state.sha256,
                permission=SenderPermission(run, participant),
                frame=frame,
                fingerprint=xxh3_64_intdigest(data),
                limits=self.limits,
                device=self.device,
            )

        frozen = not run.plan.model.tune_body
        light = frozen and kind in _LIGHT_KINDS and self.device.type == "cpu"
        if not light or len(data) > _LIGHT_BYTES or header_length(data) > _LIGHT_HEADER_BYTES:
            return await self._off_loop(lambda: handler(context, decode()))
        request = decode()
        if _is_raw(spec.codec for spec in request.frame.specs.values()):
            return handler(context, request)
        return await self._off_loop(lambda: handler(context, request))

    async def _off_loop(self, function: Callable[[], R]) -> R:
        # Threads of their own: a federation plane that waits for its disk must not delay a step.
        def call() -> R:
            try:
                with self.streams.own():
                    return function()
            except torch.OutOfMemoryError as error:  # codecs work in the GPU's memory
                raise as_shown(error) from error

        return await run_on(self.threads, call)


def _encode(reply: Reply) -> list[memoryview]:
    """The pieces of an answer.

    Raises:
        NonFinite: its tensor is beyond the run's codec; nothing was wrong with the request.
    """
    tensors = {name: (used_here(tensor), codec) for name, (tensor, codec) in reply.tensors.items()}
    try:
        return encode_frame(reply.kind, reply.meta, tensors)
    except InvalidField as error:
        raise NonFinite(
            f"the answer cannot be sent: {error.message}",
            field=next(iter(reply.tensors), None),
            limit=error.limit,
            value=error.value,
            hint="the training has diverged, or the run's codec is too narrow",
        ) from error


def _is_raw(codecs: Iterable[str]) -> bool:
    return all(codec in _RAW for codec in codecs)


def _is_light(reply: Reply) -> bool:
    tensors = [tensor for tensor, _ in reply.tensors.values()]
    here = all(tensor.device.type == "cpu" for tensor in tensors)
    light = sum(map(nbytes_of, tensors)) <= _LIGHT_BYTES
    return here and light and _is_raw(codec for _, codec in reply.tensors.values())
