"""What requests were answered with, kept for those that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from split_server.engine.steps import StepKey


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
