"""What fuzzing finds, and how it is told."""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MAX_FINDINGS = 100  # after these, fuzzing stops

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Finding:
    """One input with an outcome that it must not have.

    Attributes:
        seed: repeats it, as ``--seed`` with one frame or one request.
        input: in words.
        outcome: what happened.
    """

    seed: int
    input: str
    outcome: str


@dataclass
class Report:
    """The figures of one part of the fuzzing.

    Attributes:
        title: of the part.
        unit: of its inputs.
        outcomes: how often each occurred: ``decoded``, an error's code or a status.
        slowest_s: of one input; CPU time in process, else wall time.
        memory_bytes: growth of the resident memory, with its bound; None: not measured.
        descriptors: growth of the number of open descriptors.
        notes: lines for people.
    """

    title: str
    unit: str
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest_seed: int = 0
    memory_bytes: int = 0
    memory_limit: int = 0
    descriptors: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """Count all inputs."""
        return sum(self.outcomes.values())

    @property
    def is_full(self) -> bool:
        """Whether there are so many findings that further ones say nothing new."""
        return len(self.findings) >= MAX_FINDINGS

    def add(self, seed: int, input_: str, outcome: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(seed, input_, outcome))

    def time(self, seed: int, seconds: float) -> None:
        """Note how long an input took."""
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest_seed = seconds, seed

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "inputs": self.inputs,
            "seconds": round(self.seconds, 1),
            "outcomes": dict(self.outcomes.most_common()),
            "slowest_ms": round(1000 * self.slowest_s, 1),
            "slowest_seed": self.slowest_seed,
            "memory_mib": round(self.memory_bytes / _MIB, 1),
            "memory_limit_mib": round(self.memory_limit / _MIB, 1),
            "descriptors": self.descriptors,
            "notes": self.notes,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """Write the report for people."""
        shown = ", ".join(f"{count:,} {name}" for name, count in self.outcomes.most_common())
        return [
            f"{self.title}: {self.inputs:,} {self.unit} in {self.seconds:.0f} s: {shown}",
            f"  slowest {1000 * self.slowest_s:.0f} ms (seed {self.slowest_seed}); memory "
            f"{self.memory_bytes / _MIB:+.1f} MiB (limit {self.memory_limit / _MIB:.0f}), "
            f"descriptors {self.descriptors:+d}",
            *(f"  {note}" for note in self.notes),
            *(f"  FOUND seed {f.seed}: {f.input}: {f.outcome}" for f in self.findings),
        ]


def last_frames(error: BaseException, count: int = 2) -> str:
    """Describe an exception with the last lines of code that it passed."""
    places = traceback.extract_tb(error.__traceback__)[-count:]
    trail = " < ".join(f"{place.filename}:{place.lineno}" for place in reversed(places))
    return f"{type(error).__name__}: {error} ({trail})"[:500]
