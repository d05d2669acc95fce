"""The routes of the split plane, in plain ASGI: FastAPI would slow each training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import torch
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import InvalidField, NonFinite
from protocol.frames import decode_frame, encode_frame, frame_length, header_length, require_kind
from protocol.wire import FRAME_MEDIA_TYPE, LABELS_PATH, SOLVE_PATH, START_PATH
from split_server.engine.requests import to_public_error
from split_server.federation.credentials import require_participant
from split_server.federation.permissions import SenderPermission
from split_server.federation.snapshot import Participant, RunSnapshot
from split_server.http.body import read_body
from split_server.http.budget import Reservation
from split_server.http.connection import DRAINED_KEY
from split_server.http.errors import send_pieces
from split_server.http.handlers import HANDLERS, Handler, HandlerContext, Reply, Submit
from split_server.http.middleware import identity_of
from split_server.http.services import Services
from split_server.http.start_handlers import handle_labels, handle_solve, handle_start
from split_server.payloads.requests import SplitRequest, response_bytes
from split_server.runtime.aio import run_on
from split_server.runtime.device import used_here

_MEDIA = FRAME_MEDIA_TYPE.encode()

# Decoding and checking plain floats of up to this size takes 0.2 ms, less than switching to another
# thread and back.
_LIGHT_BYTES = 2 * 1024 * 1024

_LIGHT_HEADER_BYTES = 4096  # a valid step's header is smaller

_LIGHT_KINDS = frozenset({"forward", "backward"})  # these access no disk

_RAW_CODECS = frozenset({"float32", "float16", "bfloat16"})

ROUTES: Final[Mapping[str, tuple[str, Handler]]] = {  # path: the frame's kind, its handler
    **HANDLERS,
    START_PATH: ("start", handle_start),
    SOLVE_PATH: ("solve", handle_solve),
    LABELS_PATH: ("labels", handle_labels),
}

R = TypeVar("R")


@dataclass(frozen=True)
class SplitPlane:
    """Handles the requests of the split plane, and passes all other requests to the inner app."""

    app: ASGIApp
    services: Services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = ROUTES.get(scope["path"]) if scope["type"] == "http" else None
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
        services, settings = self.services, self.services.settings
        identity = require_participant(identity_of(scope))
        run, participant = services.runs.participant(identity.run, identity.participant)
        services.liveness.touch(run.id, participant.id)
        if scope.get("client"):
            services.engine.locate(run.id, participant.id, scope["client"][0])
        with services.body_budget.reserve() as reservation:
            limit = settings.frame_limits.max_frame_bytes
            data = await read_body(
                scope,
                receive,
                limit,
                settings.body_timeout_s,
                reservation,
                settings.stall_timeout_s,
            )
            # The run may have changed while the body was received.
            run, participant = services.runs.participant(run.id, participant.id)
            handled = await self._handle(kind, handler, run, participant, data, reservation)
            del data
            reservation.release_decoded()
            reply = handled if isinstance(handled, Reply) else await handled()
            encode = partial(_encode, reply)
            pieces = encode() if _is_light(reply) else await self._off_loop(encode)
            reservation.add_response(frame_length(pieces))
            del handled, reply, encode  # free the tensors while a slow client reads
            await send_pieces(send, 200, _MEDIA, pieces)
            del pieces
            await _drained(scope)

    async def _handle(
        self,
        kind: str,
        handler: Handler,
        run: RunSnapshot,
        participant: Participant,
        data: bytearray | memoryview,
        reservation: Reservation,
    ) -> Submit | Reply:
        """Decode and handle a request, on the event loop if it is light, otherwise on a thread."""
        context = HandlerContext(self.services, run)
        limits, device = self.services.settings.frame_limits, self.services.placement.device

        def decode() -> SplitRequest:
            frame = decode_frame(data, limits, reservation.add_decoded)
            require_kind(frame, kind)
            return SplitRequest(
                run=run.id,
                participant=participant.id,
                plan=run.plan,
                body=run.body,
                state=run.state.device.sha256,
                permission=SenderPermission(run, participant),
                frame=frame,
                fingerprint=frame.checksum,
                limits=limits,
                device=device,
                reserve=reservation.add_decoded,
            )

        handler = run.method.handlers.get(kind, handler)

        def handle(request: SplitRequest) -> Submit | Reply:
            handled = handler(context, request)
            if not isinstance(handled, Reply):
                reservation.expect_response(response_bytes(request))
            return handled

        is_light = (
            not run.method.has_tuned_bodies(run.plan)
            and kind in _LIGHT_KINDS
            and device.type == "cpu"
        )
        if not is_light or len(data) > _LIGHT_BYTES or header_length(data) > _LIGHT_HEADER_BYTES:
            return await self._off_loop(lambda: handle(decode()))
        request = decode()
        if _are_raw(spec.codec for spec in request.frame.specs.values()):
            return handle(request)
        return await self._off_loop(lambda: handle(request))

    async def _off_loop(self, function: Callable[[], R]) -> R:
        """Run a function on a codec thread; disk access of the federation does not delay it."""

        def call() -> R:
            try:
                with self.services.codec_streams.use():
                    return function()
            except torch.OutOfMemoryError as error:  # codecs use the GPU's memory
                raise to_public_error(error) from error

        return await run_on(self.services.codec_threads, call)


async def _drained(scope: Scope) -> None:
    """Wait until the response has left the write buffer, whose memory is counted."""
    drained = scope.get("state", {}).get(DRAINED_KEY)
    if drained is not None:
        await drained()


def _encode(reply: Reply) -> list[memoryview]:
    """Encode a reply into the pieces of a frame.

    Raises:
        NonFinite: the run's codec cannot represent a tensor, although the request was valid.
    """
    tensors = {name: (used_here(tensor), codec) for name, (tensor, codec) in reply.tensors.items()}
    try:
        return encode_frame(reply.kind, reply.meta, tensors)
    except InvalidField as error:
        raise NonFinite(
            f"the response cannot be encoded: {error.message}",
            field=next(iter(reply.tensors), None),
            limit=error.limit,
            value=error.value,
            hint="the training has diverged, or the run's codec has too small a range",
        ) from error


def _are_raw(codecs: Iterable[str]) -> bool:
    return all(codec in _RAW_CODECS for codec in codecs)


def _is_light(reply: Reply) -> bool:
    tensors = [tensor for tensor, _ in reply.tensors.values()]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    is_small = sum(tensor.nbytes for tensor in tensors) <= _LIGHT_BYTES
    return on_cpu and is_small and _are_raw(codec for _, codec in reply.tensors.values())
