"""The operator's routes that steer a run and show it at this moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from protocol.errors import InvalidField, NotFound
from protocol.messages import Event, RunView
from protocol.run_state import RunState
from split_server.http.services import Services
from split_server.runtime.aio import wait_for
from split_server.storage.events import IdempotentRequest

Key = Annotated[str | None, Header(alias="idempotency-key")]

_LOOK_S = 1.0  # between two looks at who is there, when nothing else happens

_LOOKS_PER_SIGN = 15  # of life, so that no HTTP proxy closes a quiet stream

_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # the second is nginx's


class OperatorRoutes:
    """Routes that pause, resume and watch runs.

    Args:
        services: services of the server.

    Attributes:
        router: the router to include in the app.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self.router = APIRouter(prefix="/v1/runs/{run}")
        add = self.router.add_api_route
        add("/pause", self.pause, methods=["POST"])
        add("/resume", self.resume, methods=["POST"])
        add("/close-round", self.close_round, methods=["POST"])
        add("/status", self.status, methods=["GET"])
        add("/stream", self.stream, methods=["GET"])

    async def pause(self, run: str, key: Key = None) -> RunView:
        """Let the open round end, and open no further one."""
        idempotent = IdempotentRequest.of(f"{run}/pause", key)
        return await run_in_threadpool(self._services.control.pause, run, idempotent)

    async def resume(self, run: str, key: Key = None) -> RunView:
        """Let a paused run go on."""
        idempotent = IdempotentRequest.of(f"{run}/resume", key)
        return await run_in_threadpool(self._services.control.resume, run, idempotent)

    async def close_round(self, run: str, key: Key = None) -> RunView:
        """End the open phase of a round without the devices that are missing."""
        idempotent = IdempotentRequest.of(f"{run}/close-round", key)
        return await run_in_threadpool(self._services.control.close_round, run, idempotent)

    async def status(self, run: str) -> RunState:
        """Return who is there, and what the run waits for."""
        return self._services.states.of(run)

    async def stream(
        self, run: str, last: Annotated[str, Header(alias="last-event-id")] = "0"
    ) -> StreamingResponse:
        """Send a run's events and its state as they change, as server-sent events."""
        if not (last.isascii() and last.isdigit() and len(last) < 16):
            raise InvalidField(
                "the id of an event is its number", field="last-event-id", value=last[:80]
            )
        self._services.runs.snapshot(run)
        return StreamingResponse(
            self._messages(run, int(last)), media_type="text/event-stream", headers=_HEADERS
        )

    async def _messages(self, run: str, after: int) -> AsyncIterator[str]:
        """Yield messages until the run is over or deleted, or the server stops."""
        services, shown, quiet = self._services, "", 0
        while not services.notifier.closed:
            change = services.notifier.get_event(run)
            try:
                events = await run_in_threadpool(services.reader.events, run, after)
                state = services.states.of(run)
            except NotFound:
                yield "event: deleted\ndata: {}\n\n"
                return
            quiet += 1
            for event in events:
                after, quiet = event.seq, 0
                yield _event_message(event)
            if (text := state.model_dump_json()) != shown:
                shown, quiet = text, 0
                yield f"event: status\ndata: {text}\n\n"
            if events:
                continue
            if state.status.is_over:
                yield "event: over\ndata: {}\n\n"
                return
            if quiet % _LOOKS_PER_SIGN == _LOOKS_PER_SIGN - 1:
                yield ": still here\n\n"
            await wait_for(change, _LOOK_S)


def _event_message(event: Event) -> str:
    return f"id: {event.seq}\ndata: {event.model_dump_json()}\n\n"
