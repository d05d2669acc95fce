"""The split plane: raw ASGI, because every microsecond here is paid at each step."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from protocol.errors import InvalidField
from protocol.frames import decode_frame, encode_frame, require_kind
from protocol.limits import FrameLimits
from protocol.messages import StepMeta, parse_message
from protocol.traffic import BACKWARD_PATH, FORWARD_PATH, INFER_PATH
from protocol.version import FRAME_MEDIA_TYPE
from split_server import rounds
from split_server.bodies import BodyKey
from split_server.credentials import Credentials, require_member
from split_server.engine import BackwardJob, Engine, ForwardJob, InferJob
from split_server.intake import check_batch, check_tokens, read_tensor
from split_server.presence import Presence
from split_server.routes.bodies import read_body
from split_server.routes.responses import send_pieces
from split_server.routes.room import Room
from split_server.service import Federation
from split_server.snapshot import Member, RunSnapshot
from split_server.steps import StepKey

_KINDS = {FORWARD_PATH: "forward", BACKWARD_PATH: "backward", INFER_PATH: "infer"}
_TENSOR = {"forward": "smashed", "backward": "gradients", "infer": "smashed"}
_ANSWER = {"forward": "features", "backward": "gradients", "infer": "features"}
_MEDIA = FRAME_MEDIA_TYPE.encode()
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class SplitPlane:
    """Answers the three paths of the split plane and passes everything else on."""

    app: ASGIApp
    federation: Federation
    engine: Engine
    credentials: Credentials
    presence: Presence
    limits: FrameLimits
    room: Room
    threads: CapacityLimiter  # for decoding and encoding
    body_timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = _KINDS.get(scope["path"]) if scope["type"] == "http" else None
        if kind is None:
            await self.app(scope, receive, send)
            return
        await self._answer(kind, scope, receive, send)

    async def _answer(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise InvalidField("this path takes POST", field="method", value=scope["method"])
        shown = require_member(self.credentials.identify(Headers(scope=scope).get("authorization")))
        run, member = self.federation.member(shown.run, shown.participant)
        self.presence.touch(run.id, member.id)
        with self.room.claim() as claim:
            limit = self.limits.max_frame_bytes
            data = await read_body(scope, receive, limit, self.body_timeout_s, claim)
            step = await self._off_loop(self._decode, kind, data)
            del data
            answer = await self._work(kind, run, member, step)
            pieces = await self._off_loop(_encode, kind, step.meta, run, answer)
            await send_pieces(send, 200, _MEDIA, pieces)

    async def _off_loop(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        # Threads of their own: a federation plane that waits for its disk must not delay a step.
        return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=self.threads)

    def _decode(self, kind: str, data: bytearray) -> _Step:
        frame = decode_frame(data, self.limits)
        require_kind(frame, kind)
        meta = parse_message(StepMeta, dict(frame.meta))
        return _Step(meta, read_tensor(frame, _TENSOR[kind]), zlib.crc32(data))

    async def _work(self, kind: str, run: RunSnapshot, member: Member, step: _Step) -> Tensor:
        body = BodyKey.of(run.backbone_path, run.settings)
        if kind == "infer":
            check_tokens(body.settings, step.tensor, "smashed")
            return await self.engine.infer(InferJob(body, step.tensor))
        rounds.require_trainer(run, member, step.meta.round, None)
        check_tokens(body.settings, step.tensor, _TENSOR[kind])
        check_batch(step.tensor, run.settings.training.batch_size, _TENSOR[kind])
        key = StepKey(run.id, member.id, step.meta.step)
        if kind == "forward":
            job = ForwardJob(key, body, step.tensor, step.fingerprint)
            return await self.engine.forward(job)
        return await self.engine.backward(BackwardJob(key, body, step.tensor, step.fingerprint))


@dataclass(frozen=True)
class _Step:
    """One request of the split plane, decoded."""

    meta: StepMeta
    tensor: Tensor  # [B, T, D]
    fingerprint: int  # tells a repeat from another request under the same name


def _encode(kind: str, meta: StepMeta, run: RunSnapshot, answer: Tensor) -> list[memoryview]:
    name = _ANSWER[kind]
    wire = run.settings.wire
    codec = wire.gradients if kind == "backward" else wire.features
    return encode_frame(name, meta.model_dump(), {name: (answer, codec)})
