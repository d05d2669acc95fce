"""The split plane: raw ASGI, because every microsecond here is paid at each step."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from protocol.errors import InvalidField, SFPromptError, WrongShape
from protocol.frames import decode_frame, encode_frame, require_kind
from protocol.limits import FrameLimits
from protocol.messages import StepMeta, parse_message
from protocol.traffic import BACKWARD_PATH, FORWARD_PATH, INFER_PATH
from protocol.version import FRAME_MEDIA_TYPE
from split_server import rounds
from split_server.bodies import BodyKey
from split_server.credentials import Credentials, require_member
from split_server.engine import BackwardJob, Engine, ForwardJob, InferJob
from split_server.presence import Presence
from split_server.routes.bodies import declared_length, read_body
from split_server.routes.gate import set_member
from split_server.routes.responses import send_error, send_pieces
from split_server.routes.room import Room
from split_server.service import Federation
from split_server.snapshot import Member, RunSnapshot
from split_server.steps import StepKey

_KINDS = {FORWARD_PATH: "forward", BACKWARD_PATH: "backward", INFER_PATH: "infer"}
_TENSOR = {"forward": "smashed", "backward": "gradients", "infer": "smashed"}
_ANSWER = {"forward": "features", "backward": "gradients", "infer": "features"}
_MEDIA = FRAME_MEDIA_TYPE.encode()


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
    body_timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = _KINDS.get(scope["path"]) if scope["type"] == "http" else None
        if kind is None:
            await self.app(scope, receive, send)
            return
        try:
            await self._answer(kind, scope, receive, send)
        except SFPromptError as error:
            await send_error(send, error)

    async def _answer(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise InvalidField("this path takes POST", field="method", value=scope["method"])
        shown = require_member(self.credentials.identify(Headers(scope=scope).get("authorization")))
        set_member(scope, shown)
        run, member = self.federation.member(shown.run, shown.participant)
        self.presence.touch(run.id, member.id)
        most, length = self.limits.max_frame_bytes, declared_length(scope)
        with self.room.take(most if length is None else min(length, most)):
            data = await read_body(scope, receive, self.limits.max_frame_bytes, self.body_timeout_s)
            meta, tensor, fingerprint = await run_in_threadpool(self._decode, kind, data)
            answer = await self._work(kind, run, member, meta, tensor, fingerprint)
            pieces = await run_in_threadpool(_encode, kind, meta, run, answer)
            await send_pieces(send, 200, _MEDIA, pieces)

    def _decode(self, kind: str, data: bytearray) -> tuple[StepMeta, Tensor, int]:
        frame = decode_frame(data, self.limits)
        require_kind(frame, kind)
        meta = parse_message(StepMeta, dict(frame.meta))
        tensor = frame.tensor(_TENSOR[kind])
        if tensor.ndim != 3 or tensor.shape[0] == 0:
            raise WrongShape(
                "a batch of tokens is needed",
                field=_TENSOR[kind],
                limit="[B, T, D] with B of at least 1",
                value=list(tensor.shape),
            )
        return meta, tensor, zlib.crc32(data)

    async def _work(
        self,
        kind: str,
        run: RunSnapshot,
        member: Member,
        meta: StepMeta,
        tensor: Tensor,
        fingerprint: int,
    ) -> Tensor:
        body = BodyKey.of(run.backbone_path, run.settings)
        if kind == "infer":
            return await self.engine.infer(InferJob(body, tensor))
        rounds.require_trainer(run, member, meta.round, None)
        key = StepKey(run.id, member.id, meta.step)
        if kind == "forward":
            return await self.engine.forward(ForwardJob(key, body, tensor, fingerprint))
        return await self.engine.backward(BackwardJob(key, body, tensor, fingerprint))


def _encode(kind: str, meta: StepMeta, run: RunSnapshot, answer: Tensor) -> list[memoryview]:
    name = _ANSWER[kind]
    wire = run.settings.wire
    codec = wire.gradients if kind == "backward" else wire.features
    return encode_frame(name, meta.model_dump(), {name: (answer, codec)})
