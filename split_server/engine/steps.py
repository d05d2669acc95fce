"""What split training keeps between a step's forward and its backward, bounded in bytes."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

from torch import Tensor

from split_server.engine.api import StepKey
from split_server.models.body_key import BodyKey


@dataclass(frozen=True, eq=False)
class Graph:
    """What autograd kept of one forward, for all the steps whose samples were in it."""

    leaf: Tensor  # smashed data [B, T, D], or prompts [B, L, P, D]: what the gradient is for
    features: Tensor  # [B, T', D], the graph's output
    rows: dict[StepKey, slice]  # of each step's samples in the batch
    nbytes: int
    seconds: float  # that its forward took

    def share(self, key: StepKey) -> int:
        """The bytes that one step answers for."""
        rows = self.rows[key]
        samples: int = rows.stop - rows.start
        return -(-self.nbytes * samples // max(1, len(self.features)))


@dataclass(eq=False)
class RetainedStep:
    """A forward whose backward is still to come."""

    body: BodyKey
    smashed: Tensor  # [B, T, D] on the body's device
    prompts: Tensor | None  # [L, P, D], where they join at the cut
    num_tokens: int | None  # of the features' tokens: those that were wanted
    answer: Tensor  # [B, T', D], what the participant was sent
    fingerprint: int  # of the request that made it
    expires_at: float  # on the monotonic clock
    graph_until: float  # on the same; its input is enough from then on
    graph: Graph | None = None  # none: the forward is run again for the backward

    @property
    def input_bytes(self) -> int:
        return self.smashed.nbytes

    @property
    def answer_bytes(self) -> int:
        return self.answer.nbytes


class RetainedSteps:
    """All retained steps, the oldest first. Not thread-safe: the engine holds its lock."""

    def __init__(self, most_per_participant: int) -> None:
        self._most = most_per_participant
        self._steps: OrderedDict[StepKey, RetainedStep] = OrderedDict()
        self._holders: Counter[Graph] = Counter()  # steps that need each graph
        self._spent: WeakSet[Graph] = WeakSet()  # whose steps may not all have been added
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def get(self, key: StepKey) -> RetainedStep | None:
        return self._steps.get(key)

    def room_of(self, key: StepKey) -> int:
        """The bytes that are free once this step has gone; of a shared graph, its share."""
        step = self._steps.get(key)
        if step is None:
            return 0
        kept = step.input_bytes if step.graph is None else step.graph.share(key)
        return kept + step.answer_bytes

    def add(self, key: StepKey, step: RetainedStep) -> None:
        """Keep a step; its participant's oldest ones go where it has too many.

        The steps of one forward are added one by one, so its graph may be spent by then: such a
        step begins with its input alone.
        """
        self.drop(key)
        if step.graph is not None and step.graph in self._spent:
            step.graph = None
        for old in self._one_too_many(key):
            self.drop(old)
        self._steps[key] = step
        self.nbytes += step.answer_bytes
        if step.graph is None:
            self.nbytes += step.input_bytes
        else:
            self._hold(step.graph)

    def next_to_go(self, key: StepKey) -> StepKey | None:
        """The step that one more of its participant's would take the place of, if any."""
        return next(iter(self._one_too_many(key)), None)

    def drop(self, key: StepKey) -> None:
        step = self._steps.pop(key, None)
        if step is None:
            return
        self.nbytes -= step.answer_bytes
        if step.graph is None:
            self.nbytes -= step.input_bytes
        else:
            self._let_go(step.graph)

    def drop_where(self, unwanted: Callable[[StepKey, RetainedStep], bool]) -> int:
        """Drop all steps of which this is true; how many."""
        gone = [key for key, step in self._steps.items() if unwanted(key, step)]
        for key in gone:
            self.drop(key)
        return len(gone)

    def spend(self, graph: Graph, but: set[StepKey]) -> None:
        """A graph has been run backward: the steps in it but these go on with their input alone."""
        others = graph.rows.keys() - but
        if others:
            self._spent.add(graph)
        for key in others:
            step = self._steps.get(key)
            if step is not None and step.graph is graph:
                self._let_go(graph)
                step.graph = None
                self.nbytes += step.input_bytes

    def let_graphs_go(self, now: float) -> None:
        """Steps whose gradients have not come for long go on with their input alone."""
        late = {s.graph for s in self._steps.values() if s.graph and s.graph_until <= now}
        for graph in late:
            self.spend(graph, set())

    def wanted(self, graph: Graph) -> set[StepKey]:
        """The steps that still need this graph."""
        held = ((key, self._steps.get(key)) for key in graph.rows)
        return {key for key, step in held if step is not None and step.graph is graph}

    def _one_too_many(self, key: StepKey) -> list[StepKey]:
        """The oldest steps of this one's participant, which go when it is added."""
        own = [k for k in self._steps if (k.run, k.participant) == (key.run, key.participant)]
        return own[: max(0, len(own) + 1 - self._most)]

    def _hold(self, graph: Graph) -> None:
        if graph not in self._holders:
            self.nbytes += graph.nbytes
        self._holders[graph] += 1

    def _let_go(self, graph: Graph) -> None:
        self._holders[graph] -= 1
        if not self._holders[graph]:
            del self._holders[graph]
            self.nbytes -= graph.nbytes


@dataclass(frozen=True)
class CachedResponse:
    """What a request was answered with."""

    tensor: Tensor
    fingerprint: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class ResponseCache:
    """The last answers of each participant, bounded in number and in bytes. Not thread-safe."""

    def __init__(self, most_per_participant: int, most_bytes: int) -> None:
        self._most = most_per_participant
        self._most_bytes = most_bytes
        self._answers: OrderedDict[tuple[str, StepKey], CachedResponse] = OrderedDict()
        self.nbytes = 0

    def get(self, kind: str, key: StepKey) -> CachedResponse | None:
        return self._answers.get((kind, key))

    def add(self, kind: str, key: StepKey, answer: CachedResponse) -> None:
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
