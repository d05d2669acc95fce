"""Retained steps, between forward and backward, and responses cached for repeated requests."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

from torch import Tensor

from split_server.engine.api import JobName, StepKey
from split_server.models.body_key import BodyKey


@dataclass(frozen=True, eq=False)
class Graph:
    """The autograd graph of one forward, shared by all steps with samples in its batch.

    Attributes:
        leaf: the tensor that the backward gives a gradient for: smashed data [B, T, D], or prompts
            [B, L, P, D].
        features: the graph's output [B, T', D].
        rows: each step's samples in the batch.
        nbytes: bytes that the graph saves.
        seconds: duration of the forward.
    """

    leaf: Tensor
    features: Tensor
    rows: dict[StepKey, slice]
    nbytes: int
    seconds: float

    def share(self, key: StepKey) -> int:
        """Return one step's share of the graph's bytes, by samples."""
        rows = self.rows[key]
        samples: int = rows.stop - rows.start
        return -(-self.nbytes * samples // max(1, len(self.features)))


@dataclass(eq=False)
class RetainedStep:
    """A forward whose backward is still to come.

    Attributes:
        smashed: [B, T, D] on the body's device.
        prompts: [L, P, D] that joined at the cut.
        num_tokens: number of the features' tokens that were returned; None: all.
        response: the features [B, T', D] that were returned.
        fingerprint: of the forward's request.
        expires_at: the step is dropped after this time, in seconds on the monotonic clock.
        graph_until: the graph is dropped after this time, on the same clock.
        graph: None: the forward runs again for the backward.
    """

    body: BodyKey
    smashed: Tensor
    prompts: Tensor | None
    num_tokens: int | None
    response: Tensor
    fingerprint: int
    expires_at: float
    graph_until: float
    graph: Graph | None = None


class RetainedSteps:
    """All retained steps, oldest first. Not thread-safe: callers hold the engine's lock."""

    def __init__(self, max_per_participant: int) -> None:
        self._max_per_participant = max_per_participant
        self._steps: OrderedDict[StepKey, RetainedStep] = OrderedDict()
        self._graph_users: Counter[Graph] = Counter()  # number of steps that need each graph
        self._used_up: WeakSet[Graph] = WeakSet()  # graphs some of whose steps may yet be added
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def get(self, key: StepKey) -> RetainedStep | None:
        return self._steps.get(key)

    def bytes_freed_by(self, key: StepKey) -> int:
        """Return the bytes that dropping a step frees; of a shared graph, the step's share."""
        step = self._steps.get(key)
        if step is None:
            return 0
        retained = step.smashed.nbytes if step.graph is None else step.graph.share(key)
        return retained + step.response.nbytes

    def add(self, key: StepKey, step: RetainedStep) -> None:
        """Retain a step; drop its participant's oldest steps above the limit.

        The steps of one forward arrive one by one. If a backward has used up their graph by then,
        the step retains its input alone.
        """
        self.drop(key)
        if step.graph is not None and step.graph in self._used_up:
            step.graph = None
        for replaced in self._steps_replaced_by(key):
            self.drop(replaced)
        self._steps[key] = step
        self.nbytes += step.response.nbytes
        if step.graph is None:
            self.nbytes += step.smashed.nbytes
        else:
            self._use_graph(step.graph)

    def next_replaced(self, key: StepKey) -> StepKey | None:
        """Return the step that adding ``key`` would drop first, if any."""
        return next(iter(self._steps_replaced_by(key)), None)

    def drop(self, key: StepKey) -> None:
        step = self._steps.pop(key, None)
        if step is None:
            return
        self.nbytes -= step.response.nbytes
        if step.graph is None:
            self.nbytes -= step.smashed.nbytes
        else:
            self._release_graph(step.graph)

    def drop_where(self, is_unwanted: Callable[[StepKey, RetainedStep], bool]) -> int:
        """Drop all steps that satisfy a condition; return their number."""
        unwanted = [key for key, step in self._steps.items() if is_unwanted(key, step)]
        for key in unwanted:
            self.drop(key)
        return len(unwanted)

    def use_up(self, graph: Graph, running: set[StepKey]) -> None:
        """Mark a graph as used up: its steps that are not ``running`` retain only their input."""
        others = graph.rows.keys() - running
        if others:
            self._used_up.add(graph)
        for key in others:
            step = self._steps.get(key)
            if step is not None and step.graph is graph:
                self._release_graph(graph)
                step.graph = None
                self.nbytes += step.smashed.nbytes

    def drop_late_graphs(self, now: float) -> None:
        """Drop the graphs of steps that have waited too long; the steps retain their input."""
        late = {s.graph for s in self._steps.values() if s.graph and s.graph_until <= now}
        for graph in late:
            self.use_up(graph, set())

    def steps_of(self, graph: Graph) -> set[StepKey]:
        """Return the retained steps that still need this graph."""
        steps = ((key, self._steps.get(key)) for key in graph.rows)
        return {key for key, step in steps if step is not None and step.graph is graph}

    def _steps_replaced_by(self, key: StepKey) -> list[StepKey]:
        """The participant's oldest steps, above the limit once ``key`` is added."""
        steps = [k for k in self._steps if (k.run, k.participant) == (key.run, key.participant)]
        return steps[: max(0, len(steps) + 1 - self._max_per_participant)]

    def _use_graph(self, graph: Graph) -> None:
        if graph not in self._graph_users:
            self.nbytes += graph.nbytes
        self._graph_users[graph] += 1

    def _release_graph(self, graph: Graph) -> None:
        self._graph_users[graph] -= 1
        if not self._graph_users[graph]:
            del self._graph_users[graph]
            self.nbytes -= graph.nbytes


@dataclass(frozen=True)
class CachedResponse:
    """The response to a request, and the request's fingerprint."""

    tensor: Tensor
    fingerprint: int


class ResponseCache:
    """Each participant's last responses, bounded in number and in bytes. Not thread-safe."""

    def __init__(self, max_per_participant: int, max_bytes: int) -> None:
        self._max_per_participant = max_per_participant
        self._max_bytes = max_bytes
        self._responses: OrderedDict[JobName, CachedResponse] = OrderedDict()
        self.nbytes = 0

    def get(self, name: JobName) -> CachedResponse | None:
        return self._responses.get(name)

    def add(self, name: JobName, response: CachedResponse) -> None:
        """Cache a response; drop older ones above the limits."""
        self._drop(name)
        kind, key = name
        earlier = [
            (k, step)
            for k, step in self._responses
            if k == kind and (step.run, step.participant) == (key.run, key.participant)
        ]
        for replaced in earlier[: max(0, len(earlier) + 1 - self._max_per_participant)]:
            self._drop(replaced)
        self._responses[name] = response
        self.nbytes += response.tensor.nbytes
        while self.nbytes > self._max_bytes:
            self._drop(next(iter(self._responses)))

    def drop_where(self, is_unwanted: Callable[[StepKey], bool]) -> None:
        """Drop the responses of all steps that satisfy a condition."""
        for name in [name for name in self._responses if is_unwanted(name[1])]:
            self._drop(name)

    def _drop(self, name: JobName) -> None:
        response = self._responses.pop(name, None)
        if response is not None:
            self.nbytes -= response.tensor.nbytes
