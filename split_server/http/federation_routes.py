"""The federation plane over HTTP: small JSON messages, and files by their hash."""

from __future__ import annotations

import math
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from protocol.base import Message
from protocol.errors import Conflict, EmptyUpdate, InvalidField, NonFinite, NotFound, WrongShape
from protocol.frames import decode_frame, require_kind
from protocol.limits import FrameLimits
from protocol.messages import (
    Assignment,
    EvaluationReport,
    Event,
    JoinRequest,
    JoinResponse,
    Results,
    RunView,
    Task,
    UpdateMeta,
    UpdateReceipt,
    parse_message,
)
from protocol.settings import RunSettings
from protocol.wire import PROTOCOL_VERSION
from split_server.engine.engine import Engine
from split_server.federation import rounds, views
from split_server.federation.credentials import (
    Credentials,
    Identity,
    Member,
    require_member,
    require_operator,
    require_reader,
)
from split_server.federation.liveness import Liveness
from split_server.federation.service import FederationService, Held
from split_server.federation.snapshot import RunSnapshot
from split_server.federation.updates import asked_shape
from split_server.http.body import BodyBudget, read_body
from split_server.http.middleware import identity_of, set_member
from split_server.runtime.aio import Notifier, wait_for
from split_server.runtime.device import Placement
from split_server.storage.events import IdempotentRequest
from split_server.storage.sample_store import SampleStore

Key = Annotated[str | None, Header(alias="idempotency-key")]

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")

_SHA256 = re.compile(r"[0-9a-f]{64}")

_UPDATE_MARGIN = 1024 * 1024  # header and padding of the frame

Wait = Annotated[float, Query(ge=0, le=3600, description="seconds to wait for something new")]


class FederationRoutes:
    """The routes, with what they need; `router` goes into the app."""

    def __init__(
        self,
        federation: FederationService,
        credentials: Credentials,
        presence: Liveness,
        notifier: Notifier,
        engine: Engine,
        samples: SampleStore,
        placement: Placement,
        room: BodyBudget,
        limits: FrameLimits,
        body_timeout_s: float,
        max_wait_s: float,
    ) -> None:
        self._federation = federation
        self._credentials = credentials
        self._presence = presence
        self._notifier = notifier
        self._engine = engine
        self._samples = samples
        self._placement = placement
        self._room = room
        self._limits = limits
        self._body_timeout_s = body_timeout_s
        self._max_wait_s = max_wait_s
        self.router = APIRouter(prefix="/v1")
        add = self.router.add_api_route
        add("/health", self.health, methods=["GET"])
        add("/runs", self.create, methods=["POST"], status_code=201)
        add("/runs", self.runs, methods=["GET"])
        add("/runs/{run}", self.run, methods=["GET"])
        add("/runs/{run}/cancel", self.cancel, methods=["POST"])
        add("/runs/{run}/results", self.results, methods=["GET"])
        add("/runs/{run}/events", self.events, methods=["GET"])
        add("/runs/{run}/participants", self.join, methods=["POST"], status_code=201)
        add("/runs/{run}/participants/me", self.leave, methods=["DELETE"])
        add("/runs/{run}/samples", self.forget, methods=["DELETE"])
        add("/runs/{run}/assignment", self.assignment, methods=["GET"])
        add("/runs/{run}/head", self.head, methods=["GET"])
        add("/runs/{run}/states/{sha256}/state", self.state, methods=["GET"])
        add("/runs/{run}/states/{sha256}/delta", self.delta, methods=["GET"])
        add("/runs/{run}/update", self.update, methods=["PUT"])
        add("/runs/{run}/evaluation", self.evaluation, methods=["PUT"])

    # For everybody

    async def health(self) -> dict[str, Any]:
        """Whether the server answers, and what it runs on."""
        return {
            "status": "ok",
            "version": PROTOCOL_VERSION,
            "release": version("sfprompt"),
            "device": str(self._placement.device),
            "dtype": self._placement.dtype_name,
        }

    async def runs(self) -> list[RunView]:
        """All runs, the oldest first."""
        return self._federation.views()

    async def run(self, run: str) -> RunView:
        """One run."""
        return views.run_view(self._federation.run(run))

    # For the operator

    async def create(self, request: Request, settings: RunSettings, key: Key = None) -> RunView:
        """Create a run; takes as long as preparing its backbone does."""
        require_operator(identity_of(request.scope))
        once = IdempotentRequest.of("create", key, _content(settings))
        return await run_in_threadpool(self._federation.create, settings, once)

    async def cancel(self, request: Request, run: str, key: Key = None) -> RunView:
        """Stop a run."""
        require_operator(identity_of(request.scope))
        once = IdempotentRequest.of(f"{run}/cancel", key)
        return await run_in_threadpool(self._federation.cancel, run, once)

    async def results(self, request: Request, run: str) -> Results:
        """Rounds, participants and bytes of a run, as far as it has come."""
        require_reader(identity_of(request.scope), run)
        return await run_in_threadpool(self._federation.results, run)

    async def events(
        self, request: Request, run: str, after: Annotated[int, Query(ge=0)] = 0, wait: Wait = 0
    ) -> list[Event]:
        """What has happened since event ``after``; waits for the first one."""
        require_reader(identity_of(request.scope), run)
        give_up_at = time.monotonic() + min(wait, self._max_wait_s)
        while True:
            ticket = self._notifier.get_event(run)
            found = await run_in_threadpool(self._federation.events, run, after)
            left = give_up_at - time.monotonic()
            if found or left <= 0 or self._notifier.closed:
                return found
            await wait_for(ticket, left)

    # For participants

    async def join(
        self, request: Request, run: str, message: JoinRequest, key: Key = None
    ) -> JoinResponse:
        """Join a run. The credential in the answer stands for the participant from now on."""
        self._credentials.may_join(identity_of(request.scope))
        once = IdempotentRequest.of(f"{run}/join", key, _content(message))
        joined = await run_in_threadpool(self._federation.join, run, message, once)
        set_member(request.scope, Member(run, joined.participant))
        return joined

    async def leave(self, request: Request, run: str, key: Key = None) -> dict[str, Any]:
        """Leave a run for good; one who has left may ask again, and gets the same answer."""
        member = require_member(identity_of(request.scope), run)
        once = IdempotentRequest.of(f"{run}/{member.participant}/leave", key)
        await run_in_threadpool(self._federation.leave, run, member.participant, once)
        return {}

    async def forget(self, request: Request, run: str) -> dict[str, Any]:
        """Forget the smashed data that the server keeps of the participant that asks."""
        member = self._member(request, run)
        await run_in_threadpool(self._samples.drop, run, member.participant)
        return {}

    async def assignment(
        self,
        request: Request,
        run: str,
        task: Task | None = None,
        round_: Annotated[int, Query(alias="round", ge=0)] = 0,
        attempt: Annotated[int, Query(ge=0)] = 0,
        wait: Wait = 0,
    ) -> Assignment:
        """What to do next; waits while it is still the named one. Who has left is to stop."""
        member = require_member(identity_of(request.scope), run)
        wait = min(wait, self._max_wait_s)
        if not self._federation.has_left(run, member.participant):
            self._presence.touch(run, member.participant, wait)
        if self._federation.due(run):
            await run_in_threadpool(self._federation.go_on, run, wait=False)
        give_up_at = time.monotonic() + wait
        while True:
            ticket = self._notifier.get_event(run)
            found = self._federation.assignment(run, member.participant)
            new = (found.task, found.round, found.attempt) != (task, round_, attempt)
            left = give_up_at - time.monotonic()
            if new or left <= 0 or self._notifier.closed:
                return found
            await wait_for(ticket, left)

    async def head(self, request: Request, run: str, sha256: str | None = None) -> Response:
        """The head file; only this one, where it is named."""
        require_reader(self._identity_of_reader(request, run), run)
        snapshot = self._federation.run(run)
        if sha256 is not None and sha256 != snapshot.head.sha256:
            _require_sha256(sha256, "sha256")
            raise NotFound("the run has another head by now", field="sha256", value=sha256)
        path = self._federation.files(run).head_after(snapshot.renewed)
        return _file(request, path, snapshot.head.sha256)

    async def state(self, request: Request, run: str, sha256: str) -> Response:
        """A global state of the run."""
        require_reader(self._identity_of_reader(request, run), run)
        self._federation.run(run)
        _require_sha256(sha256, "sha256")
        return _file(request, self._federation.files(run).state(sha256), sha256)

    async def delta(self, request: Request, run: str, sha256: str, base: str) -> Response:
        """A frame of kind ``delta``: what takes the state ``base`` to this one."""
        require_reader(self._identity_of_reader(request, run), run)
        self._federation.run(run)
        _require_sha256(sha256, "sha256")
        _require_sha256(base, "base")
        return _file(request, self._federation.files(run).delta(sha256, base), f"{base}-{sha256}")

    async def update(self, request: Request, run: str, key: Key = None) -> UpdateReceipt:
        """Count an update: a frame of kind ``update``."""
        member = self._member(request, run)
        await self._require_wanted(
            run, member.participant, IdempotentRequest.of(_update_of(member), key)
        )
        # Nothing larger than the state it is to change, in the widest codec, can be an update,
        # and what is told of neurons beside it.
        snapshot = self._federation.run(run)
        limit = snapshot.state.nbytes + _UPDATE_MARGIN
        if snapshot.plan.distillation.every:
            limit += await run_in_threadpool(_told_bytes, snapshot)
        limit = min(limit, self._limits.max_frame_bytes)
        with self._room.claim() as claim:
            data = await read_body(
                request.scope, request.receive, limit, self._body_timeout_s, claim
            )
            return await run_in_threadpool(self._count, member, data, key)

    async def _require_wanted(self, run: str, participant: str, once: IdempotentRequest) -> None:
        """Refuse an update that cannot count before it takes memory; a repeat is let in."""
        try:
            rounds.require_any_trainer(*self._federation.member(run, participant))
        except Conflict:
            if not await run_in_threadpool(self._federation.is_known, once):
                raise

    def _count(
        self, member: Member, data: bytearray | memoryview, key: str | None
    ) -> UpdateReceipt:
        run, participant = member.run, member.participant
        once = IdempotentRequest.of(_update_of(member), key, data)
        frame = decode_frame(data, self._limits)
        require_kind(frame, "update")
        meta = parse_message(UpdateMeta, dict(frame.meta))
        held = self._held_by(run, participant, meta)
        try:
            receipt = self._federation.update(run, participant, meta, frame, once, held)
        except (EmptyUpdate, NonFinite, WrongShape):
            self._let_go(run, participant, meta)
            raise
        self._let_go(run, participant, meta)
        return receipt

    def _held_by(self, run: str, participant: str, meta: UpdateMeta) -> Held | None:
        """What gives the part of an update that was tuned on the server, if there is one."""
        snapshot = self._federation.run(run)
        if snapshot.held is None or meta.samples == 0:
            return None
        if meta.session is None:
            raise InvalidField(
                "an update names the session whose prompts or body belong to it", field="session"
            )
        session = meta.session
        return lambda: self._engine.trained_state(run, participant, session)

    def _let_go(self, run: str, participant: str, meta: UpdateMeta) -> None:
        """Nothing more comes of this participant in its round: others may wait for the memory."""
        snapshot = self._federation.run(run)
        open_round = snapshot.open_round
        if not snapshot.plan.model.tune_body or open_round is None:
            return
        if (open_round.round, open_round.attempt) == (meta.round, meta.attempt):  # no late repeat
            self._engine.release(run, participant)

    async def evaluation(
        self, request: Request, run: str, report: EvaluationReport, key: Key = None
    ) -> dict[str, Any]:
        """Take a measurement of the newest global state."""
        member = self._member(request, run)
        once = IdempotentRequest.of(f"{run}/{member.participant}/evaluation", key, _content(report))
        await run_in_threadpool(self._federation.evaluation, run, member.participant, report, once)
        return {}

    # Who is asking

    def _identity_of_reader(self, request: Request, run: str) -> Identity:
        identity = identity_of(request.scope)
        if isinstance(identity, Member) and identity.run == run:
            self._member(request, run)
        return identity

    def _member(self, request: Request, run: str) -> Member:
        """The participant that asks, if it is in good standing."""
        member = require_member(identity_of(request.scope), run)
        self._federation.member(run, member.participant)
        self._presence.touch(run, member.participant)
        return member


def _told_bytes(run: RunSnapshot) -> int:
    """Of what an update of the open round tells of neurons; may have to look at the model."""
    shape = asked_shape(run.plan, run.round)
    return torch.float32.itemsize * math.prod(shape) if shape else 0


def _update_of(member: Member) -> str:
    """The scope of an update's key."""
    return f"{member.run}/{member.participant}/update"


def _content(message: Message) -> bytes:
    return message.model_dump_json().encode()


def _require_sha256(text: str, field: str) -> None:
    if not _SHA256.fullmatch(text):
        raise InvalidField("not a SHA-256", field=field, value=text[:80])


def _require_range(wanted: str, size: int) -> None:
    """Refuse what is no range ``bytes=N-`` or ``bytes=N-M`` of a file of so many bytes."""
    found = _RANGE.fullmatch(wanted)
    if found is None:
        raise InvalidField(
            "a range is one run of bytes", field="range", limit="bytes=N-", value=wanted[:80]
        )
    first, last = int(found[1]), found[2]
    if first >= size:
        raise InvalidField(
            "the range begins behind the end of the file", field="range", limit=size, value=first
        )
    if last and int(last) < first:
        raise InvalidField(
            "the range ends before it begins", field="range", limit=first, value=int(last)
        )


def _file(request: Request, path: Path, sha256: str) -> Response:
    try:
        stat = path.stat()
    except OSError:
        raise NotFound("there is no such file", field="sha256", value=sha256) from None
    etag = f'"{sha256}"'
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"etag": etag})
    if (wanted := request.headers.get("range")) is not None:
        _require_range(wanted, stat.st_size)
    return FileResponse(
        path, media_type="application/octet-stream", headers={"etag": etag}, stat_result=stat
    )
