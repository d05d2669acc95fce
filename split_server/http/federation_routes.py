"""The routes of the federation plane: JSON messages, and files named by their hash."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from protocol.base import Message
from protocol.errors import InvalidField, NotFound
from protocol.frames import Frame, decode_frame, require_kind
from protocol.messages import (
    Absence,
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
from protocol.quality import EvaluationView
from protocol.settings import RunSettings
from protocol.wire import PROTOCOL_VERSION
from split_server.federation import views
from split_server.federation.credentials import ParticipantIdentity, require_participant
from split_server.http.body import read_body
from split_server.http.middleware import identity_of, set_participant
from split_server.http.services import Services
from split_server.runtime.aio import wait_for
from split_server.storage.events import IdempotentRequest
from split_server.storage.tensor_files import check_file

Key = Annotated[str | None, Header(alias="idempotency-key")]

Number = Annotated[int, Query(ge=0, lt=2**53)]  # the range of `protocol.messages.Count`

PathNumber = Annotated[int, PathParameter(ge=0, lt=2**53)]

Wait = Annotated[float, Query(ge=0, le=3600, description="seconds to wait for a change")]

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FederationRoutes:
    """The routes of the federation plane.

    Args:
        services: services of the server.

    Attributes:
        router: the router to include in the app.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._federation = services.federation
        self._reader = services.reader
        self._runs = services.runs
        self.router = APIRouter(prefix="/v1")
        add = self.router.add_api_route
        add("/health", self.health, methods=["GET"])
        add("/runs", self.create, methods=["POST"], status_code=201)
        add("/runs", self.runs, methods=["GET"])
        add("/runs/{run}", self.run, methods=["GET"])
        add("/runs/{run}", self.delete, methods=["DELETE"])
        add("/runs/{run}/cancel", self.cancel, methods=["POST"])
        add("/runs/{run}/results", self.results, methods=["GET"])
        add("/runs/{run}/rounds/{round_}/evaluation", self.evaluation_of, methods=["GET"])
        add("/runs/{run}/events", self.events, methods=["GET"])
        add("/runs/{run}/participants", self.join, methods=["POST"], status_code=201)
        add("/runs/{run}/participants/me", self.leave, methods=["DELETE"])
        add("/runs/{run}/participants/{participant}", self.remove, methods=["DELETE"])
        add("/runs/{run}/participants/me/absence", self.end, methods=["PUT"])
        add("/runs/{run}/samples", self.forget, methods=["DELETE"])
        add("/runs/{run}/assignment", self.assignment, methods=["GET"])
        add("/runs/{run}/head", self.head, methods=["GET"])
        add("/runs/{run}/states/{sha256}/state", self.state, methods=["GET"])
        add("/runs/{run}/states/{sha256}/delta", self.delta, methods=["GET"])
        add("/runs/{run}/evaluation", self.evaluation, methods=["PUT"])
        add("/runs/{run}/update", self.update, methods=["PUT"])
        self._update_route: BaseRoute = next(
            route for route in self.router.routes if getattr(route, "endpoint", None) == self.update
        )

    def limits_body_itself(self, scope: Scope) -> bool:
        """Whether the route of a request reads a frame with its own size limit, not JSON."""
        return self._update_route.matches(scope)[0] is Match.FULL

    # For all, and for those who may join

    async def health(self) -> dict[str, Any]:
        """Return that the server is up, with its version and device."""
        placement = self._services.placement
        return {
            "status": "ok",
            "version": PROTOCOL_VERSION,
            "release": version("sfprompt"),
            "device": str(placement.device),
            "dtype": placement.dtype_name,
        }

    async def runs(self) -> list[RunView]:
        """List all runs, the oldest first."""
        return self._reader.views()

    async def run(self, run: str) -> RunView:
        """Return one run."""
        return views.run_view(self._runs.snapshot(run))

    # Routes of the operator

    async def create(self, settings: RunSettings, key: Key = None) -> RunView:
        """Create a run; respond when its backbone is prepared."""
        idempotent = IdempotentRequest.of("create", key, _content(settings))
        return await run_in_threadpool(self._federation.create, settings, idempotent)

    async def cancel(self, run: str, key: Key = None) -> RunView:
        """Stop a run."""
        idempotent = IdempotentRequest.of(f"{run}/cancel", key)
        return await run_in_threadpool(self._federation.cancel, run, idempotent)

    async def delete(self, run: str, key: Key = None) -> dict[str, Any]:
        """Delete a run that is over."""
        idempotent = IdempotentRequest.of("delete", key, run.encode())
        await run_in_threadpool(self._services.removals.delete_run, run, idempotent)
        return {}

    async def remove(self, run: str, participant: str, key: Key = None) -> dict[str, Any]:
        """Remove a participant from its run, and revoke its credential."""
        idempotent = IdempotentRequest.of(f"{run}/remove", key, participant.encode())
        remove = self._services.removals.remove_participant
        await run_in_threadpool(remove, run, participant, idempotent)
        return {}

    async def results(self, run: str) -> Results:
        """Return a run's rounds, participants and traffic so far."""
        return await run_in_threadpool(self._reader.results, run)

    async def evaluation_of(self, run: str, round_: PathNumber) -> EvaluationView:
        """Return how well a round's state classifies held-out images, in all and by device."""
        return await run_in_threadpool(self._reader.evaluation, run, round_)

    async def events(self, run: str, after: Number = 0, wait: Wait = 0) -> list[Event]:
        """Return the events after number ``after``; wait up to ``wait`` s for the first."""
        notifier = self._services.notifier
        deadline = time.monotonic() + self._bounded(wait)
        while True:
            change = notifier.get_event(run)
            events = await run_in_threadpool(self._reader.events, run, after)
            remaining = deadline - time.monotonic()
            if events or remaining <= 0 or notifier.closed:
                return events
            await wait_for(change, remaining)

    # Routes of participants

    async def join(
        self, request: Request, run: str, message: JoinRequest, key: Key = None
    ) -> JoinResponse:
        """Join a run; respond with the participant's credential."""
        idempotent = IdempotentRequest.of(f"{run}/join", key, _content(message))
        joined = await run_in_threadpool(self._federation.join, run, message, idempotent)
        set_participant(request.scope, ParticipantIdentity(run, joined.participant))
        return joined

    async def leave(self, request: Request, run: str, key: Key = None) -> dict[str, Any]:
        """Leave a run permanently; a repetition gets the same response."""
        identity = require_participant(identity_of(request.scope))
        idempotent = IdempotentRequest.of(f"{run}/{identity.participant}/leave", key)
        await run_in_threadpool(self._federation.leave, run, identity.participant, idempotent)
        return {}

    async def end(self, request: Request, run: str, absence: Absence) -> dict[str, Any]:
        """Note that the sender ends; no round waits for it until its next request."""
        identity = require_participant(identity_of(request.scope))
        end = self._federation.end
        await run_in_threadpool(end, run, identity.participant, absence.reason)
        return {}

    async def forget(self, request: Request, run: str) -> dict[str, Any]:
        """Delete the sender's smashed data, and the labels that it shared."""
        identity = self._participant(request, run)
        forget = self._services.labels.forget
        await run_in_threadpool(forget, run, identity.participant, "its device deleted them")
        return {}

    async def assignment(
        self,
        request: Request,
        run: str,
        task: Task | None = None,
        round_: Annotated[int, Query(alias="round", ge=0, lt=2**53)] = 0,
        attempt: Number = 0,
        wait: Wait = 0,
    ) -> Assignment:
        """Return the sender's next task; wait up to ``wait`` s while it equals the query's."""
        identity = require_participant(identity_of(request.scope))
        notifier, advancer = self._services.notifier, self._services.advancer
        wait = self._bounded(wait)
        if not self._runs.has_left(run, identity.participant):
            self._services.liveness.touch(run, identity.participant, wait)
        if advancer.is_due(run):
            await run_in_threadpool(advancer.try_advance, run, wait=False)
        deadline, first = time.monotonic() + wait, None
        while True:
            change = notifier.get_event(run)
            assignment = self._federation.assignment(run, identity.participant)
            first = first or assignment
            is_new = (assignment.task, assignment.round, assignment.attempt) != (
                task,
                round_,
                attempt,
            )
            if assignment.waiting is not None:  # else a task follows at once
                is_new = is_new or assignment.waiting != first.waiting
            remaining = deadline - time.monotonic()
            if is_new or remaining <= 0 or notifier.closed:
                return assignment
            await wait_for(change, remaining)

    async def head(self, request: Request, run: str, sha256: str | None = None) -> Response:
        """Return the head file; ``sha256``: refuse if the newest head has another hash."""
        self._touch(request, run)
        snapshot = self._runs.snapshot(run)
        if sha256 is not None and sha256 != snapshot.head.sha256:
            _require_sha256(sha256, "sha256")
            raise NotFound("the run has a newer head", field="sha256", value=sha256)
        path = self._runs.files(run).head_after(snapshot.renewed)
        return await _checked_file(request, path, snapshot.head.sha256)

    async def state(self, request: Request, run: str, sha256: str) -> Response:
        """Return the device's part of a global state."""
        self._touch(request, run)
        self._runs.snapshot(run)
        _require_sha256(sha256, "sha256")
        return await _checked_file(request, self._runs.files(run).state(sha256), sha256)

    async def delta(self, request: Request, run: str, sha256: str, base: str) -> Response:
        """Return a frame of kind ``delta``: the change from the state ``base`` to this one."""
        self._touch(request, run)
        self._runs.snapshot(run)
        _require_sha256(sha256, "sha256")
        _require_sha256(base, "base")
        path = self._runs.files(run).delta(sha256, base)
        return _file_response(request, path, f"{base}-{sha256}")

    async def update(self, request: Request, run: str, key: Key = None) -> UpdateReceipt:
        """Count an update: a frame of kind ``update``."""
        identity = self._participant(request, run)
        settings = self._services.settings
        limit = await run_in_threadpool(
            self._federation.admit_update,
            run,
            identity.participant,
            IdempotentRequest.of(_update_scope(identity), key),
        )
        limit = min(limit, settings.frame_limits.max_frame_bytes)
        with self._services.body_budget.reserve() as reservation:
            data = await read_body(
                request.scope,
                request.receive,
                limit,
                settings.body_timeout_s,
                reservation,
                settings.stall_timeout_s,
            )
            decode = partial(decode_frame, data, settings.frame_limits, reservation.add_decoded)
            return await run_in_threadpool(self._update, identity, data, decode, key)

    def _update(
        self,
        identity: ParticipantIdentity,
        data: bytearray | memoryview,
        decode: Callable[[], Frame],
        key: str | None,
    ) -> UpdateReceipt:
        idempotent = IdempotentRequest.of(_update_scope(identity), key, data)
        frame = decode()
        require_kind(frame, "update")
        meta = parse_message(UpdateMeta, dict(frame.meta))
        return self._federation.update(identity.run, identity.participant, meta, frame, idempotent)

    async def evaluation(
        self, request: Request, run: str, report: EvaluationReport, key: Key = None
    ) -> dict[str, Any]:
        """Count an evaluation of the newest global state."""
        identity = self._participant(request, run)
        idempotent = IdempotentRequest.of(
            f"{run}/{identity.participant}/evaluation", key, _content(report)
        )
        await run_in_threadpool(
            self._federation.evaluation, run, identity.participant, report, idempotent
        )
        return {}

    def _bounded(self, wait: float) -> float:
        return min(wait, self._services.settings.max_wait_s)

    def _touch(self, request: Request, run: str) -> None:
        """Record that the sender is live, if it is a participant.

        Raises:
            Forbidden: it has left.
        """
        if isinstance(identity_of(request.scope), ParticipantIdentity):
            self._participant(request, run)

    def _participant(self, request: Request, run: str) -> ParticipantIdentity:
        """Record that the sender is live and return it; refuse a participant that has left."""
        identity = require_participant(identity_of(request.scope))
        self._runs.participant(run, identity.participant)
        self._services.liveness.touch(run, identity.participant)
        return identity


def _update_scope(identity: ParticipantIdentity) -> str:
    """Return the scope of an update's idempotency key."""
    return f"{identity.run}/{identity.participant}/update"


def _content(message: Message) -> bytes:
    return message.model_dump_json().encode()


def _require_sha256(text: str, field: str) -> None:
    if not _SHA256.fullmatch(text):
        raise InvalidField(
            "a SHA-256 is 64 hexadecimal digits in lower case", field=field, value=text[:80]
        )


def _check_range(header: str, size: int) -> None:
    """Refuse a range header other than ``bytes=N-`` or ``bytes=N-M`` within a file's size."""
    match = _RANGE.fullmatch(header)
    if match is None:
        raise InvalidField(
            "the server accepts a single range of bytes",
            field="range",
            limit="bytes=N-",
            value=header[:80],
        )
    first, last = int(match[1]), match[2]
    if first >= size:
        raise InvalidField(
            "the range begins after the end of the file", field="range", limit=size, value=first
        )
    if last and int(last) < first:
        raise InvalidField(
            "the range ends before it begins", field="range", limit=first, value=int(last)
        )


async def _checked_file(request: Request, path: Path, sha256: str) -> Response:
    """Respond with a file, after a check of its hash if the first byte is requested."""
    response = _file_response(request, path, sha256)
    first = _RANGE.fullmatch(request.headers.get("range", "bytes=0-"))
    if isinstance(response, FileResponse) and first is not None and int(first[1]) == 0:
        await run_in_threadpool(check_file, path, sha256)
    return response


def _file_response(request: Request, path: Path, sha256: str) -> Response:
    try:
        stat = path.stat()
    except OSError:
        raise NotFound("there is no such file", field="sha256", value=sha256) from None
    etag = f'"{sha256}"'
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"etag": etag})
    if (header := request.headers.get("range")) is not None:
        _check_range(header, stat.st_size)
    return FileResponse(
        path, media_type="application/octet-stream", headers={"etag": etag}, stat_result=stat
    )
