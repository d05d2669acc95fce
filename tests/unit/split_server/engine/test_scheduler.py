"""The order of tasks: backwards first, then the oldest, with turns for all senders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.plan import ModelPlan
from split_server.engine.api import StepKey
from split_server.engine.scheduler import Batch, Schedule
from split_server.engine.steps import Graph, RetainedStep, RetainedSteps
from split_server.engine.tasks import BackwardTask, ForwardTask, Kind
from split_server.models.body_key import BodyKey
from tests.support.federation import SPLIT

BODY = BodyKey(Path("backbone"), SPLIT)

OTHER = BodyKey(Path("other"), SPLIT)

EVERYTHING = 10**9  # seconds


def kind(body: BodyKey = BODY, tokens: int = 5) -> Kind:
    return Kind(body, tokens, 4, None, "graph")


def forward(who: str, samples: int = 1, of: Kind | None = None) -> ForwardTask:
    of = of or kind()
    return ForwardTask(
        kind=of,
        sender=("r", who),
        samples=samples,
        nbytes=1,
        fail=lambda _: None,
        smashed=torch.empty(samples, of.tokens, of.width),
        prompts=None,
        key=None,
        done=lambda _: None,
    )


def graph_of(seconds: float, **samples: int) -> Graph:
    ends = [sum(list(samples.values())[: place + 1]) for place in range(len(samples))]
    rows = {
        StepKey("r", who, "s"): slice(end - size, end)
        for (who, size), end in zip(samples.items(), ends, strict=True)
    }
    features = torch.empty(ends[-1], 5, 4)
    return Graph(features, features, rows, nbytes=1000, seconds=seconds)


def backward(who: str, graph: Graph | None, samples: int = 1) -> BackwardTask:
    step = RetainedStep(
        body=BODY,
        smashed=torch.empty(samples, 5, 4),
        prompts=None,
        num_tokens=None,
        response=torch.empty(samples, 5, 4),
        fingerprint=0,
        expires_at=0.0,
        graph_until=0.0,
        graph=graph,
    )
    return BackwardTask(
        kind=kind(),
        sender=("r", who),
        samples=samples,
        nbytes=1,
        fail=lambda _: None,
        key=StepKey("r", who, "s"),
        step=step,
        gradients=torch.empty(samples, 5, 4),
        done=lambda _: None,
    )


def all_steps(graph: Graph) -> set[StepKey]:
    return set(graph.rows)


def schedule(max_samples: int | None = 8, wait: float = 0.0, tokens: int = 1000) -> Schedule:
    return Schedule(tokens, max_samples, wait)


def names(batch: Batch | float) -> list[str]:
    assert isinstance(batch, Batch)
    return [task.sender[1] for task in batch.tasks]


def order(queue: Schedule, now: float = 0.0) -> list[list[str]]:
    batches = []
    while len(queue):
        batches.append(names(queue.next(now, all_steps)))
    return batches


def test_an_empty_schedule_has_no_batch() -> None:
    assert schedule().next(0.0, all_steps) == float("inf")


def test_tasks_of_one_kind_join_up_to_the_largest_batch() -> None:
    queue = schedule(max_samples=4)
    for who in "abcdef":
        queue.add_forward(forward(who), 0.0)
    assert order(queue) == [["a", "b", "c", "d"], ["e", "f"]]


def test_a_task_larger_than_the_largest_batch_is_alone() -> None:
    queue = schedule(max_samples=4)
    for who, samples in (("a", 9), ("b", 1)):
        queue.add_forward(forward(who, samples), 0.0)
    assert order(queue) == [["a"], ["b"]]


def test_without_a_number_of_samples_the_tokens_decide() -> None:
    queue = schedule(max_samples=None, tokens=20)
    for who in "abcdef":
        queue.add_forward(forward(who), 0.0)
    assert order(queue) == [["a", "b", "c", "d"], ["e", "f"]]


def test_other_bodies_and_shapes_do_not_join() -> None:
    queue = schedule()
    for who, of in (("a", kind()), ("b", kind(OTHER)), ("c", kind(tokens=6)), ("d", kind())):
        queue.add_forward(forward(who, of=of), 0.0)
    assert order(queue) == [["a", "d"], ["b"], ["c"]]


def test_backward_goes_before_forward() -> None:
    queue, graph = schedule(), graph_of(1.0, x=1, y=1)
    queue.add_forward(forward("a"), 0.0)
    queue.add_backward(backward("b", None), 1.0)
    for who in "xy":
        queue.add_backward(backward(who, graph), 2.0)
    assert order(queue, now=3.0) == [["x", "y"], ["b"], ["a"]]


def test_a_sender_of_many_samples_waits_behind_a_sender_of_few() -> None:
    queue = schedule(max_samples=1)
    for _ in range(50):
        queue.add_forward(forward("flood"), 0.0)
    served = [names(queue.next(0.0, all_steps))[0] for _ in range(10)]
    queue.add_forward(forward("late"), 1.0)
    served += [names(queue.next(1.0, all_steps))[0] for _ in range(2)]
    assert "late" in served[-2:]


@given(st.lists(st.integers(1, 8), min_size=2, max_size=6))
def test_over_time_all_senders_get_equal_shares(sizes: Sequence[int]) -> None:
    """Each sender always has a task waiting; task sizes vary."""
    queue, had = schedule(max_samples=1), [0] * len(sizes)
    for _ in range(2):
        for who, samples in enumerate(sizes):
            queue.add_forward(forward(str(who), samples), 0.0)
    while sum(had) < 400:
        who = int(names(queue.next(0.0, all_steps))[0])
        had[who] += sizes[who]
        queue.add_forward(forward(str(who), sizes[who]), 0.0)
    assert max(had) - min(had) <= 3 * max(sizes)


def test_a_forward_waits_for_recent_senders() -> None:
    queue = schedule(wait=0.1)
    for who in "ab":
        queue.add_forward(forward(who), 0.0)
    assert order(queue) == [["a", "b"]]
    queue.add_forward(forward("a"), 0.5)
    assert queue.next(0.5, all_steps) == pytest.approx(0.1)
    queue.add_forward(forward("b"), 0.55)
    assert names(queue.next(0.55, all_steps)) == ["a", "b"], "all_steps is here"
    queue.add_forward(forward("a"), 0.9)
    assert names(queue.next(1.0, all_steps)) == ["a"], "and not for ever"


def test_a_full_batch_and_a_lone_sender_do_not_wait() -> None:
    queue = schedule(max_samples=2, wait=0.1)
    for now in (0.0, 0.2, 0.4):
        queue.add_forward(forward("a"), now)
        assert names(queue.next(now, all_steps)) == ["a"]
    queue.add_forward(forward("b"), 0.5)
    queue.add_forward(forward("a", samples=2), 0.5)
    assert names(queue.next(0.5, all_steps)) == ["b"]


def test_a_forward_does_not_wait_for_silent_senders() -> None:
    queue = schedule(wait=0.1)
    for who in "ab":
        queue.add_forward(forward(who), 0.0)
    assert order(queue) == [["a", "b"]]
    queue.add_forward(forward("a"), 100.0)
    assert names(queue.next(100.0, all_steps)) == ["a"]


def test_a_graph_waits_about_as_long_as_its_forward_took() -> None:
    queue, graph = schedule(), graph_of(0.2, a=1, b=1)
    queue.add_backward(backward("a", graph), 1.0)
    assert queue.next(1.0, all_steps) == pytest.approx(0.2)
    assert names(queue.next(1.21, all_steps)) == ["a"]


def test_other_tasks_run_while_a_graph_waits() -> None:
    queue, graph = schedule(), graph_of(0.2, a=1, b=1)
    queue.add_backward(backward("a", graph), 1.0)
    queue.add_forward(forward("c"), 1.0)
    assert names(queue.next(1.0, all_steps)) == ["c"]
    queue.add_forward(forward("d"), 2.0)
    assert names(queue.next(2.0, all_steps)) == ["d"], "before an incomplete graph, too"
    queue.add_forward(forward("e"), 50.0)
    assert names(queue.next(50.0, all_steps)) == ["a"], "but not for ever"


@pytest.mark.parametrize(("missing", "through_it"), [(1, True), (3, True), (4, False)])
def test_a_graph_without_most_of_its_gradients_is_not_used(missing: int, through_it: bool) -> None:
    queue, graph = schedule(), graph_of(0.0, a=3, b=missing)
    queue.add_backward(backward("a", graph, samples=3), 1.0)
    batch = queue.next(1.0, all_steps)
    assert isinstance(batch, Batch)
    assert names(batch) == ["a"]
    assert (batch.graph is graph) == through_it


def test_a_graph_does_not_wait_for_dropped_steps() -> None:
    queue, graph = schedule(), graph_of(1000.0, a=1, b=1)
    queue.add_backward(backward("a", graph), 1.0)
    only_a = {StepKey("r", "a", "s")}
    batch = queue.next(1.0, lambda _: only_a)
    assert isinstance(batch, Batch)
    assert batch.graph is graph


def test_drain_removes_all_tasks() -> None:
    queue, graph = schedule(), graph_of(1.0, a=1, b=1)
    queue.add_forward(forward("x"), 0.0)
    queue.add_backward(backward("y", None), 0.0)
    queue.add_backward(backward("a", graph), 0.0)
    assert len(queue) == queue.samples == 3
    assert {task.sender[1] for task in queue.drain()} == {"x", "y", "a"}
    assert len(queue) == 0
    assert queue.next(0.0, all_steps) == float("inf")


# Bytes of the retained steps


@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "spend"]), st.integers(0, 5))))
def test_the_bytes_of_steps_and_graphs_are_counted_correctly(moves: list[tuple[str, int]]) -> None:
    steps, graphs = RetainedSteps(4), [graph_of(0.0, a=1, b=2, c=3), graph_of(0.0, d=1, e=1, f=1)]
    for move, place in moves:
        graph, who = graphs[place // 3], "abcdef"[place]
        key = StepKey("r", who, "s")
        if move == "add":
            steps.add(key, backward(who, graph).step)
        elif move == "drop":
            steps.drop(key)
        else:
            steps.use_up(graph, {key})
        retained = [one for k in "abcdef" if (one := steps.get(StepKey("r", k, "s"))) is not None]
        alive = {one.graph for one in retained if one.graph is not None}
        alone = sum(one.smashed.nbytes for one in retained if one.graph is None)
        answers = sum(one.response.nbytes for one in retained)
        assert steps.nbytes == alone + sum(one.nbytes for one in alive) + answers


def test_split_settings_are_part_of_a_kind() -> None:
    assert isinstance(BODY.settings, ModelPlan)
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    assert kind(OTHER) != kind()
