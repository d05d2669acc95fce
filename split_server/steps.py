"""What split training keeps between a step's forward and its backward, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepKey:
    """One step of one participant of one run."""

    run: str
    participant: str
    step: str


@dataclass(frozen=True)
class RetainedStep:
    """A forward whose backward is still to come."""

    leaf: Tensor  # smashed data [B, T, D] or prompts [L, P, D]: what the gradient is for
    features: Tensor  # [B, T, D], the graph's output
    answer: Tensor  # [B, T, D], what the participant was sent
    fingerprint: int  # of the request that made it
    nbytes: int  # what the graph holds
    expires_at: float  # on the monotonic clock


class RetainedSteps:
    """All retained steps, the oldest first. Not thread-safe: the engine holds its lock."""

    def __init__(self, most_per_participant: int) -> None:
        self._most = most_per_participant
        self._steps: OrderedDict[StepKey, RetainedStep] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def get(self, key: StepKey) -> RetainedStep | None:
        return self._steps.get(key)

    def add(self, key: StepKey, step: RetainedStep) -> None:
        """Keep a step; its participant's oldest ones go where it has too many."""
        self.drop(key)
        own = [k for k in self._steps if (k.run, k.participant) == (key.run, key.participant)]
        for old in own[: max(0, len(own) + 1 - self._most)]:
            self.drop(old)
        self._steps[key] = step
        self.nbytes += step.nbytes

    def drop(self, key: StepKey) -> None:
        step = self._steps.pop(key, None)
        if step is not None:
            self.nbytes -= step.nbytes

    def drop_where(self, unwanted: Callable[[StepKey, RetainedStep], bool]) -> int:
        """Drop all steps of which this is true; how many."""
        gone = [key for key, step in self._steps.items() if unwanted(key, step)]
        for key in gone:
            self.drop(key)
        return len(gone)


@dataclass(frozen=True)
class Answer:
    """What a request was answered with."""

    tensor: Tensor
    fingerprint: int

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class Answers:
    """The last answers of each participant, bounded in number and in bytes. Not thread-safe."""

    def __init__(self, most_per_participant: int, most_bytes: int) -> None:
        self._most = most_per_participant
        self._most_bytes = most_bytes
        self._answers: OrderedDict[tuple[str, StepKey], Answer] = OrderedDict()
        self.nbytes = 0

    def get(self, kind: str, key: StepKey) -> Answer | None:
        return self._answers.get((kind, key))

    def add(self, kind: str, key: StepKey, answer: Answer) -> None:
        """Keep an answer; older ones go where there is no room."""
        self._drop((kind, key))
        own = [
            (k, one)
            for k, one in self._answers
            if k == kind and (one.run, one.participant) == (key.run, key.participant)
        ]
        for old in own[: max(0, len(own) + 1 - self._most)]:
            self._drop(old)
        self._answers[kind, key] = answer
        self.nbytes += answer.nbytes
        while self.nbytes > self._most_bytes:
            self._drop(next(iter(self._answers)))

    def drop_where(self, unwanted: Callable[[StepKey], bool]) -> None:
        for kind, key in [place for place in self._answers if unwanted(place[1])]:
            self._drop((kind, key))

    def _drop(self, place: tuple[str, StepKey]) -> None:
        answer = self._answers.pop(place, None)
        if answer is not None:
            self.nbytes -= answer.nbytes
