"""The federation plane on a real database, with a clock that the test moves."""

from __future__ import annotations

import itertools

import pytest
import torch

from protocol.errors import (
    Conflict,
    EmptyUpdate,
    Forbidden,
    IdempotencyKeyReused,
    InvalidField,
    NonFinite,
    NotFound,
    RunClosed,
    SFPromptError,
    StaleRound,
    StepLost,
    WrongShape,
)
from protocol.messages import JoinRequest, RoundStatus, RunStatus, Task
from split_model.checkpoints.state import load_state
from split_server.storage.events import IdempotentRequest
from tests.support.federation import (
    FederationHarness,
    Trained,
    random_state,
    run_settings,
    state_of,
    state_value,
)
from tuning_methods.custom.settings import Custom


def test_a_whole_run(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2)
    a = harness.join(run, "a")
    assert harness.task(run, a).task is Task.WAIT
    b = harness.join(run, "b")
    for round_ in (1, 2):
        for one in (a, b):
            assigned = harness.task(run, one)
            assert (assigned.task, assigned.round) == (Task.TRAIN, round_)
        harness.update(run, a, state_of(1.0), round_=round_, samples=30, train_loss=1.0)
        assert harness.task(run, a).task is Task.WAIT
        harness.update(run, b, state_of(5.0), round_=round_, samples=10, train_loss=3.0)
        for one in (a, b):
            assert harness.task(run, one).task is Task.EVALUATE
        harness.evaluate(run, a, round_=round_, samples=10, correct=9, loss_sum=2.0)
        harness.evaluate(run, b, round_=round_, samples=5, correct=3, loss_sum=7.0)
    assert state_value(harness, run) == 2.0
    results = harness.reader.results(run)
    assert results.run.status is RunStatus.FINISHED
    assert results.run.finished_at is not None
    first = results.rounds[0]
    assert (first.status, first.samples, first.train_loss) == (RoundStatus.CLOSED, 40, 1.5)
    assert (first.accuracy, first.evaluation_loss, first.evaluation_samples) == (0.8, 0.6, 15)
    assert first.updated == first.sampled == (a, b)
    assert harness.task(run, a).task is Task.STOP
    assert harness.kinds(run) == [
        "run_created",
        "participant_joined",
        "participant_joined",
        *(
            [
                "round_opened",
                "update_counted",
                "update_counted",
                "state_aggregated",
                "evaluation_counted",
                "evaluation_counted",
                "round_closed",
            ]
            * 2
        ),
        "run_finished",
    ]


def test_a_round_continues_without_stragglers(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, round_timeout_s=100, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    harness.time.now += 99
    assert harness.task(run, a).task is Task.WAIT
    harness.time.now += 1
    harness.task(run, a)
    assert state_value(harness, run) == 1.0
    with pytest.raises(StaleRound):
        harness.update(run, b, state_of(9.0))
    assert state_value(harness, run) == 1.0
    assert harness.reader.results(run).rounds[0].updated == (a,)


def test_the_deadline_holds_without_polls_in_between(harness: FederationHarness) -> None:
    run = harness.create(round_timeout_s=10)
    a = harness.join(run)
    harness.time.now += 11
    with pytest.raises(StaleRound):
        harness.update(run, a, state_of(1.0))


def test_too_few_updates_repeat_the_round_and_then_fail_the_run(harness: FederationHarness) -> None:
    run = harness.create(round_timeout_s=10, max_repeats=1, min_updates=1)
    a = harness.join(run)
    with pytest.raises(EmptyUpdate):
        harness.update(run, a, state_of(1.0), samples=0)
    again = harness.task(run, a)
    assert (again.task, again.round, again.attempt) == (Task.TRAIN, 1, 1)
    with pytest.raises(StaleRound):
        harness.update(run, a, state_of(1.0), attempt=0)
    with pytest.raises(EmptyUpdate):
        harness.update(run, a, state_of(1.0), samples=0, attempt=1)
    stop = harness.task(run, a)
    assert (stop.task, stop.status) == (Task.STOP, RunStatus.FAILED)
    assert stop.reason is not None
    assert "0 of at least 1 updates" in stop.reason
    statuses = [view.status for view in harness.reader.results(run).rounds]
    assert statuses == [RoundStatus.REPEATED, RoundStatus.REPEATED]
    assert state_value(harness, run) == 0.0


def test_an_evaluation_of_no_sample_ends_the_wait_and_does_not_count(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=2, rounds=2)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    for round_, reported in ((1, (0.5, 2.0, 10)), (2, (None, None, 0))):
        for one in (a, b):
            harness.update(run, one, state_of(1.0), round_=round_)
        harness.evaluate(run, a, round_=round_, samples=0, correct=0, loss_sum=0.0)
        assert harness.task(run, a).task is Task.WAIT
        if round_ == 1:
            harness.evaluate(run, b, round_=1, samples=10, correct=5, loss_sum=20.0)
        else:
            harness.evaluate(run, b, round_=2, samples=0, correct=0, loss_sum=0.0)
        view = harness.reader.results(run).rounds[-1 if round_ == 2 else 0]
        assert view.status is RoundStatus.CLOSED
        assert (view.accuracy, view.evaluation_loss, view.evaluation_samples) == reported
    assert harness.task(run, a).task is Task.STOP


def test_an_unanswered_evaluation_ends_at_its_deadline(harness: FederationHarness) -> None:
    run = harness.create(round_timeout_s=10)
    a = harness.join(run)
    harness.update(run, a, state_of(1.0))
    assert harness.task(run, a).task is Task.EVALUATE
    harness.time.now += 10
    assert harness.task(run, a).round == 2
    first = harness.reader.results(run).rounds[0]
    assert (first.status, first.accuracy, first.evaluation_samples) == (RoundStatus.CLOSED, None, 0)


def test_a_round_does_not_wait_for_a_participant_that_leaves(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    harness.federation.leave(run, b, IdempotentRequest.of(f"{run}/{b}/leave", "k"))
    assert ("left", run, b) in harness.watcher.events
    assert harness.task(run, a).round == 2
    harness.federation.leave(run, b, IdempotentRequest.of(f"{run}/{b}/leave", "k"))
    with pytest.raises(Forbidden):
        harness.federation.leave(run, b, IdempotentRequest.of(f"{run}/{b}/leave", "k2"))
    assert harness.federation.assignment(run, b).task is Task.STOP


@pytest.mark.parametrize(
    ("samples", "change", "error", "goes_on"),
    [
        (0, {}, EmptyUpdate, True),
        (10, {"prompts": float("nan")}, NonFinite, True),
        (10, {"tail.head.weight": float("inf")}, NonFinite, True),
        (10, {"prompts": None}, WrongShape, True),
        (10, {"more": 1.0}, WrongShape, True),
        (101, {}, InvalidField, False),
    ],
)
def test_an_update_that_cannot_count_is_refused(
    harness: FederationHarness,
    samples: int,
    change: dict[str, float | None],
    error: type[SFPromptError],
    goes_on: bool,
) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    bad, good = harness.join(run, "bad"), harness.join(run, "good")
    state = state_of(7.0)
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state.setdefault(name, torch.zeros(3)).view(-1)[0] = value
    with pytest.raises(error):
        harness.update(run, bad, state, samples=samples)
    assert harness.task(run, bad).task is (Task.WAIT if goes_on else Task.TRAIN)
    harness.update(run, good, state_of(1.0))
    if goes_on:
        assert state_value(harness, run) == 1.0
        view = harness.reader.results(run).rounds[0]
        assert (view.updated, view.samples) == ((good,), 10)
        assert "update_refused" in harness.kinds(run)
    else:
        assert harness.runs.snapshot(run).closed_rounds == 0


def test_a_wrong_shape_is_refused(harness: FederationHarness) -> None:
    run = harness.create()
    a = harness.join(run)
    state = state_of(1.0)
    state["prompts"] = state["prompts"].unsqueeze(0)
    with pytest.raises(WrongShape) as caught:
        harness.update(run, a, state)
    assert caught.value.field == "prompts"


def test_a_refused_participant_may_send_a_valid_update(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    with pytest.raises(EmptyUpdate):
        harness.update(run, a, state_of(9.0), samples=0)
    harness.update(run, a, state_of(1.0))
    harness.update(run, b, state_of(3.0))
    assert state_value(harness, run) == 2.0


def on_device(value: float) -> dict[str, torch.Tensor]:
    """The device's part of an update if the server tunes the prompts."""
    return {name: tensor for name, tensor in state_of(value).items() if name != "prompts"}


def tuned(value: float) -> Trained:
    return lambda: {"prompts": torch.full((1, 2, 192), value)}


def test_prompts_tuned_on_the_server_are_averaged_with_the_rest(
    harness: FederationHarness,
) -> None:
    run = harness.create(prompt_at="cut", min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, on_device(1.0), samples=30, trained=tuned(1.0))
    harness.update(run, b, on_device(5.0), samples=10, trained=tuned(5.0))
    assert state_value(harness, run) == 2.0
    assert harness.state(run)["prompts"].shape == (1, 2, 192)
    seen = harness.runs.files(run).state(harness.task(run, a).state.sha256)
    assert "prompts" not in load_state(seen)


def test_an_update_whose_prompts_are_lost_may_be_repeated(harness: FederationHarness) -> None:
    def lost() -> dict[str, torch.Tensor]:
        raise StepLost("the server was restarted")

    run = harness.create(prompt_at="cut", evaluate_every=0)
    a = harness.join(run)
    with pytest.raises(StepLost):
        harness.update(run, a, on_device(1.0), key="k", trained=lost)
    assert harness.task(run, a).task is Task.TRAIN
    harness.update(run, a, on_device(3.0), key="k", trained=tuned(3.0))
    assert state_value(harness, run) == 3.0


def test_prompts_that_are_not_finite_decline_the_update(harness: FederationHarness) -> None:
    def burst() -> dict[str, torch.Tensor]:
        raise NonFinite("the prompts are not finite")

    run = harness.create(prompt_at="cut", min_participants=2, evaluate_every=0)
    bad, good = harness.join(run, "bad"), harness.join(run, "good")
    with pytest.raises(NonFinite):
        harness.update(run, bad, on_device(7.0), trained=burst)
    assert harness.task(run, bad).task is Task.WAIT
    with pytest.raises(WrongShape):  # nor may it send prompts of its own
        harness.update(run, bad, state_of(7.0), trained=tuned(7.0))
    harness.update(run, good, on_device(1.0), trained=tuned(1.0))
    assert state_value(harness, run) == 1.0


def test_without_samples_the_run_fails_without_waiting(harness: FederationHarness) -> None:
    run = harness.create(max_repeats=2)
    a = harness.join(run)
    for attempt in range(3):
        assert harness.task(run, a).attempt == attempt
        with pytest.raises(EmptyUpdate):
            harness.update(run, a, state_of(1.0), samples=0, attempt=attempt)
    assert harness.runs.snapshot(run).status is RunStatus.FAILED


def test_the_result_does_not_depend_on_the_order_of_arrival(harness: FederationHarness) -> None:
    names = ["d", "a", "c", "b"]
    states = {name: random_state(place) for place, name in enumerate(names)}
    seen = set()
    for order in itertools.islice(itertools.permutations(names), 0, 24, 5):
        run = harness.create(min_participants=4, evaluate_every=0)
        who = {name: harness.join(run, name) for name in order}
        for name in reversed(order):
            harness.update(run, who[name], states[name], samples=ord(name) - 90)
        seen.add(harness.runs.snapshot(run).state.device.sha256)
    assert len(seen) == 1


def test_a_repeated_update_counts_once(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0), key="k")
    harness.update(run, a, state_of(1.0), key="k")
    with pytest.raises(IdempotencyKeyReused):
        harness.update(run, a, state_of(2.0), key="k")
    with pytest.raises(Conflict) as second:
        harness.update(run, a, state_of(2.0), key="k2")
    assert (second.value.field, second.value.limit, second.value.value) == ("update", 1, 2)
    harness.update(run, b, state_of(1.0), key="k")
    assert harness.reader.results(run).rounds[0].samples == 20
    harness.update(run, a, state_of(1.0), key="k")  # the round is over; the answer is the same
    assert harness.kinds(run).count("update_counted") == 2


def test_a_repeated_join_gives_the_same_participant(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2)
    request = JoinRequest(name="a", train_samples=1, test_samples=0, num_classes=10)
    once = IdempotentRequest.of(f"{run}/join", "k", b"content")
    first = harness.federation.join(run, request, once)
    again = harness.federation.join(run, request, once)
    assert first.credential == again.credential
    assert len(harness.runs.snapshot(run).participants) == 1
    with pytest.raises(IdempotencyKeyReused):
        harness.federation.join(run, request, IdempotentRequest.of(f"{run}/join", "k", b"other"))


def test_a_repeated_creation_gives_the_same_run(harness: FederationHarness) -> None:
    once = IdempotentRequest.of("create", "k", b"content")
    first = harness.federation.create(Custom.of(run_settings()), once)
    assert harness.federation.create(Custom.of(run_settings()), once) == first
    assert len(harness.reader.views()) == 1


def test_evaluations_are_checked_and_counted_once(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2)
    a, b = harness.join(run, "a"), harness.join(run, "b", test=0)
    with pytest.raises(StaleRound):
        harness.evaluate(run, a)
    for one in (a, b):
        harness.update(run, one, state_of(1.0))
    with pytest.raises(InvalidField):
        harness.evaluate(run, a, samples=11)
    with pytest.raises(InvalidField):
        harness.evaluate(run, a, samples=0, correct=0, loss_sum=0.1)
    with pytest.raises(InvalidField):
        harness.evaluate(run, a, loss_sum=-1.0)
    with pytest.raises(StaleRound):
        harness.evaluate(run, b)
    harness.evaluate(run, a, key="k")
    harness.evaluate(run, a, key="k")
    assert harness.runs.snapshot(run).closed_rounds == 1


def test_a_run_can_be_cancelled_once(harness: FederationHarness) -> None:
    run = harness.create()
    a = harness.join(run)
    view = harness.federation.cancel(run, IdempotentRequest.of(f"{run}/cancel", "k"))
    assert view.status is RunStatus.CANCELLED
    assert harness.federation.cancel(run, IdempotentRequest.of(f"{run}/cancel", "k")) == view
    with pytest.raises(RunClosed):
        harness.federation.cancel(run, IdempotentRequest.of(f"{run}/cancel", "k2"))
    with pytest.raises(RunClosed):
        harness.update(run, a, state_of(1.0))
    with pytest.raises(RunClosed):
        harness.join(run, "late")
    assert harness.task(run, a).task is Task.STOP


def test_a_device_with_other_classes_is_refused(harness: FederationHarness) -> None:
    run = harness.create()
    request = JoinRequest(name="a", train_samples=1, test_samples=1, num_classes=3)
    with pytest.raises(InvalidField) as caught:
        harness.federation.join(run, request, IdempotentRequest.of(f"{run}/join", "k"))
    assert (caught.value.field, caught.value.limit) == ("num_classes", 10)


def test_devices_whose_class_names_differ_cannot_share_a_run(harness: FederationHarness) -> None:
    run = harness.create(min_participants=3)

    def join(name: str, classes: str | None) -> None:
        request = JoinRequest(
            name=name, train_samples=1, test_samples=1, num_classes=10, classes_sha256=classes
        )
        harness.federation.join(run, request, IdempotentRequest.of(f"{run}/join", name))

    join("cats", "a" * 64)
    join("guest", None)
    with pytest.raises(InvalidField) as caught:
        join("dogs", "b" * 64)
    assert (caught.value.field, caught.value.limit) == ("classes_sha256", ["a" * 64])
    assert "class_names" in (caught.value.hint or "")
    join("more cats", "a" * 64)


def test_unknown_runs_and_participants_are_not_found(harness: FederationHarness) -> None:
    run = harness.create()
    with pytest.raises(NotFound):
        harness.runs.snapshot("r0")
    with pytest.raises(NotFound):
        harness.runs.participant(run, "p9999")


@pytest.mark.parametrize("key", [None, "", "x" * 201, "line\nbreak", "é"])
def test_a_change_needs_a_key(key: str | None) -> None:
    with pytest.raises(InvalidField) as caught:
        IdempotentRequest.of("scope", key)
    assert caught.value.field == "idempotency-key"
