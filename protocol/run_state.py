"""The operator's view of a run at this moment: who is there, and what the run waits for."""

from __future__ import annotations

from enum import StrEnum

from protocol.base import Message
from protocol.messages import Count, RoundStatus, RunStatus
from protocol.parts import Text

__all__ = ["DeviceState", "DeviceStatus", "RunState"]


class DeviceStatus(StrEnum):
    """What a device does, as far as the server knows."""

    WAITING = "waiting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SILENT = "silent"  # no request for longer than `live_window_s`
    GONE = "gone"  # it said so: it has left, or its process has ended
    REMOVED = "removed"  # by the operator


class DeviceState(Message):
    """A device of a run.

    Attributes:
        id: of the participant.
        name: of the device.
        status: what it does.
        heard_at: time of its last request, in whole seconds since 1970; None: none since the
            server started.
        train_samples, test_samples: its images.
        up, down: bytes at the socket, from and to the device.
    """

    id: Text
    name: Text
    status: DeviceStatus
    heard_at: Count | None
    train_samples: Count
    test_samples: Count
    up: Count
    down: Count


class RunState(Message):
    """A run at this moment.

    Attributes:
        id, name: of the run.
        status: of the run.
        paused: no further round opens until the operator resumes the run.
        round: the open or last one.
        rounds: of the whole run.
        phase: of the open round; None: none is open.
        closes_at: when the open phase ends without those that are missing, in whole seconds
            since 1970; None: no phase is open.
        summary: what the run waits for, in one sentence.
        devices: in the order of joining.
        engine: what the engine has computed for the run since the server started.
    """

    id: Text
    name: Text
    status: RunStatus
    paused: bool
    round: Count
    rounds: Count
    phase: RoundStatus | None
    closes_at: Count | None
    summary: str
    devices: tuple[DeviceState, ...]
    engine: dict[str, float]
