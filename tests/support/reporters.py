"""Reporters for devices in tests."""

from __future__ import annotations

from typing import Any


class SilentReporter:
    """Ignores everything; tests override what they record."""

    def event(self, kind: str, **data: Any) -> None: ...

    def advance(self, phase: str, done: int, total: int) -> None: ...

    def close(self) -> None: ...


class ListReporter(SilentReporter):
    """Appends each event to a list, in the form of `JsonReporter`."""

    def __init__(self, events: list[dict[str, Any]] | None = None) -> None:
        self.events = [] if events is None else events

    def event(self, kind: str, **data: Any) -> None:
        self.events.append({"event": kind, **data})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]
