"""Bytes at the socket by purpose, with the one table by which both ends count them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from protocol.errors import InvalidField
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    LABELS_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
    SOLVE_PATH,
    START_PATH,
)

__all__ = [
    "Phase",
    "Traffic",
    "get_phases",
    "total_bytes",
]


class Phase(StrEnum):
    """The purpose of bytes at the socket."""

    DOWNLOAD = "download"  # the head, once
    SMASHED = "smashed"  # split training: forward request, or samples for the server's cache
    FEATURES = "features"  # split training: forward response
    GRADIENTS = "gradients"  # split training: backward, both ways; exchange, up
    UPDATES = "updates"  # prompts and tail, both ways
    INFERENCE = "inference"  # evaluation and prediction, both ways
    CONTROL = "control"  # everything else


_PHASES: Final = frozenset(str(phase) for phase in Phase)

_BY_PATH: Final[Mapping[str, tuple[Phase, Phase]]] = {
    FORWARD_PATH: (Phase.SMASHED, Phase.FEATURES),
    BACKWARD_PATH: (Phase.GRADIENTS, Phase.GRADIENTS),
    INFER_PATH: (Phase.INFERENCE, Phase.INFERENCE),
    EXCHANGE_PATH: (Phase.GRADIENTS, Phase.FEATURES),
    SAMPLES_PATH: (Phase.SMASHED, Phase.SMASHED),
    MISSING_PATH: (Phase.SMASHED, Phase.SMASHED),
    START_PATH: (Phase.SMASHED, Phase.FEATURES),
    SOLVE_PATH: (Phase.UPDATES, Phase.UPDATES),
    LABELS_PATH: (Phase.UPDATES, Phase.UPDATES),
}

_BY_LAST_SEGMENT: Final[Mapping[str, Phase]] = {
    "head": Phase.DOWNLOAD,
    "state": Phase.UPDATES,
    "delta": Phase.UPDATES,
    "update": Phase.UPDATES,
}


def get_phases(path: str) -> tuple[Phase, Phase]:
    """Return the phases of the bytes of a request to this path (up) and of its response (down)."""
    if path in _BY_PATH:
        return _BY_PATH[path]
    phase = _BY_LAST_SEGMENT.get(path.rsplit("/", 1)[-1], Phase.CONTROL)
    return phase, phase


def total_bytes(counts: Mapping[str, Mapping[str, int]]) -> int:
    """Sum the bytes of all phases in both directions.

    Args:
        counts: bytes by phase and direction, as `Traffic.to_dict` returns them.
    """
    return sum(sum(directions.values()) for directions in counts.values())


@dataclass
class Traffic:
    """Bytes by phase: ``up`` from the device to the server, ``down`` to the device."""

    up: dict[Phase, int] = field(default_factory=dict)
    down: dict[Phase, int] = field(default_factory=dict)

    def add(self, path: str, up: int, down: int) -> None:
        """Count the bytes at the socket of one request to ``path`` and of its response."""
        phase_up, phase_down = get_phases(path)
        self.up[phase_up] = self.up.get(phase_up, 0) + up
        self.down[phase_down] = self.down.get(phase_down, 0) + down

    def merge(self, other: Traffic) -> None:
        """Add the counts of ``other``."""
        for phase, count in other.up.items():
            self.up[phase] = self.up.get(phase, 0) + count
        for phase, count in other.down.items():
            self.down[phase] = self.down.get(phase, 0) + count

    def since(self, earlier: Traffic) -> Traffic:
        """Return the bytes counted since ``earlier``, a `copy` of this object, was made."""
        return Traffic(
            {phase: count - earlier.up.get(phase, 0) for phase, count in self.up.items()},
            {phase: count - earlier.down.get(phase, 0) for phase, count in self.down.items()},
        )

    def copy(self) -> Traffic:
        return Traffic(dict(self.up), dict(self.down))

    def total(self) -> int:
        """Sum all bytes in both directions."""
        return sum(self.up.values()) + sum(self.down.values())

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return ``{phase: {"up": bytes, "down": bytes}}`` for every phase with a count."""
        return {
            str(phase): {"up": self.up.get(phase, 0), "down": self.down.get(phase, 0)}
            for phase in Phase
            if phase in self.up or phase in self.down
        }

    @classmethod
    def from_dict(cls, counts: Mapping[str, Mapping[str, int]]) -> Traffic:
        """Rebuild the counts from `to_dict`.

        Raises:
            InvalidField: an unknown phase, or a count other than ``up`` and ``down``.
        """
        traffic = cls()
        for name, count in counts.items():
            if name not in _PHASES or set(count) != {"up", "down"}:
                raise InvalidField(
                    "traffic must give up and down for each of these phases",
                    field=f"traffic.{name}",
                    limit=sorted(_PHASES),
                    value=sorted(count),
                )
            traffic.up[Phase(name)] = count["up"]
            traffic.down[Phase(name)] = count["down"]
        return traffic
