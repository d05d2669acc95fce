"""Attacks on the model by participants with valid credentials, and what stops them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from torch import Tensor

from protocol.errors import InvalidField
from protocol.messages import RoundView, Task
from tests.support.federation import FederationHarness, random_state, state_of, state_value
from tests.support.server import RunningServer, joined, new_run


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[FederationHarness]:
    opened = FederationHarness(tmp_path)
    with closing(opened):
        yield opened


def run_of(harness: FederationHarness, count: int, **federation: object) -> tuple[str, list[str]]:
    run = harness.create(min_participants=count, evaluate_every=0, **federation)
    return run, [harness.join(run, f"d{number}") for number in range(count)]


def first_round(harness: FederationHarness, run: str) -> RoundView:
    return harness.reader.results(run).rounds[0]


def test_an_update_of_huge_numbers_is_refused_and_named(harness: FederationHarness) -> None:
    """Tried: one of three sends finite numbers of 1e30, which would be the whole mean. Stopped by:
    the bound relative to the median of the updates' lengths. The round goes on without it."""
    run, (a, hostile, b) = run_of(harness, 3)
    harness.update(run, a, state_of(1.0))
    harness.update(run, hostile, state_of(1e30))
    harness.update(run, b, state_of(3.0))
    assert state_value(harness, run) == 2.0
    view = first_round(harness, run)
    assert (view.refused, view.updated, view.samples) == ((hostile,), (a, b), 20)
    (event,) = [e for e in harness.reader.events(run, 0) if e.kind == "update_refused"]
    assert (event.data["participant"], event.data["code"]) == (hostile, "norm_too_large")
    assert event.data["value"] > 1e30 > event.data["limit"]
    assert harness.runs.refusals[run] == 1


def test_the_negative_of_an_update_times_twenty_is_refused(harness: FederationHarness) -> None:
    """Tried: sign-flip x 20, which turns the mean of five around. Stopped by: the bound
    relative to the median."""
    run, who = run_of(harness, 5)
    for number, one in enumerate(who):
        harness.update(run, one, state_of(-20.0 if number == 3 else 1.0))
    assert state_value(harness, run) == 1.0
    assert first_round(harness, run).refused == (who[3],)


def test_updates_of_usual_lengths_all_count(harness: FederationHarness) -> None:
    """Tried: nothing. Devices with other data send changes of other lengths; all of them count."""
    run, who = run_of(harness, 4)
    for one, value in zip(who, (1.0, 2.0, -4.0, 9.0), strict=True):
        harness.update(run, one, state_of(value))
    assert state_value(harness, run) == 2.0
    assert first_round(harness, run).refused == ()


def test_a_restarted_server_refuses_the_same_updates(tmp_path: Path) -> None:
    """Tried: a kill between the updates and the new state. Stopped by: the decision depends on
    files that stay until the result is in the database; the state is the same bit for bit."""
    hashes = []
    for restarts in (False, True):
        harness = FederationHarness(tmp_path / str(restarts))
        with closing(harness):
            run, who = run_of(harness, 4, aggregation="trimmed-mean")
            for number, one in enumerate(who):
                state = random_state(number)
                if number == 1:
                    state = {name: 1e5 * tensor for name, tensor in state.items()}
                if restarts and number == 3:
                    harness.close()
                    harness.open()
                harness.update(run, one, state)
            view = first_round(harness, run)
            assert view.refused == (who[1],)
            assert view.state is not None
            hashes.append(view.state.sha256)
    assert hashes[0] == hashes[1]


def test_a_lone_bad_update_ends_no_run_at_once(harness: FederationHarness) -> None:
    """Tried: the only other participant sends 1e30. Stopped by: a limit relative to the state; the
    round is repeated, because too few updates are left, and the reason names the participant."""
    run, (a, hostile) = run_of(harness, 2, min_updates=2, max_repeats=1)
    harness.update(run, a, state_of(1.0))
    harness.update(run, hostile, state_of(1e30))
    (repeated,) = [e for e in harness.reader.events(run, 0) if e.kind == "round_repeated"]
    assert hostile in repeated.data["reason"]
    assert harness.task(run, a).attempt == 1
    for one in (a, hostile):
        harness.update(run, one, state_of(2.0), attempt=1)
    assert state_value(harness, run) == 2.0


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_a_robust_rule_outvotes_noise_of_the_usual_length(
    harness: FederationHarness, rule: str
) -> None:
    """Tried: one of five sends noise as long as the honest changes, which no bound of lengths can
    tell. Stopped by: the run's aggregation rule."""
    run, who = run_of(harness, 5, aggregation=rule)
    noise = random_state(0)
    length = float(sum(tensor.square().sum() for tensor in noise.values())) ** 0.5
    honest = float(sum(tensor.square().sum() for tensor in state_of(1.0).values())) ** 0.5
    for number, one in enumerate(who):
        state = {name: tensor * honest / length for name, tensor in noise.items()}
        harness.update(run, one, state if number == 2 else state_of(1.0 + 0.01 * number))
    worst = max(float((tensor - 1).abs().max()) for tensor in harness.state(run).values())
    assert worst < 0.1
    assert first_round(harness, run).refused == ()


def test_a_declared_number_of_samples_is_bounded(harness: FederationHarness) -> None:
    """Tried: a join with 2^52 samples, whose update would outweigh all others. Stopped by:
    federation.max_samples."""
    run = harness.create(min_participants=2, max_samples=500)
    harness.join(run, "a", train=500)
    for counts in ({"train": 501}, {"train": 2**52}, {"test": 2**52}):
        with pytest.raises(InvalidField) as caught:
            harness.join(run, "b", **counts)
        assert caught.value.limit == 500


def test_poison_over_http_is_refused_and_named(server: RunningServer) -> None:
    """Tried: an update of 1e30 over real sockets. Stopped by: the bound relative to the median;
    results and metrics name the device."""
    operator = server.operator()
    run = new_run(operator, min_participants=3, evaluate_every=0)
    apis = [joined(server, run, name) for name in ("p", "q", "r")]
    assert apis[0].assignment(run).task is Task.TRAIN
    states: list[dict[str, Tensor]] = [state_of(0.01), state_of(0.02), state_of(1e30)]
    for api, state in zip(apis, states, strict=True):
        assert api.update(run, state, "u").is_success
    results = operator.call("GET", f"/v1/runs/{run}/results").json()
    assert results["rounds"][0]["refused"] == ["p0003"]
    assert results["rounds"][0]["updated"] == ["p0001", "p0002"]
    page = server.operator().http.get("/metrics").text
    assert f'sfprompt_updates_refused_total{{run="{run}"}} 1.0' in page


@pytest.mark.parametrize("query", ["after=99999999999999999999", f"after={2**53}", "after=-1"])
def test_a_number_of_a_query_is_bounded(server: RunningServer, run: str, query: str) -> None:
    """Tried: numbers beyond the database's integers, which were a failure of the server. Stopped
    by: the bound of every number in a query."""
    answer = server.operator().call("GET", f"/v1/runs/{run}/events?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_field")
    assert answer.json()["error"]["field"] == "after"
    member = server.api(server.api().join(run, f"q{query}").credential)
    for name in ("round", "attempt"):
        path = f"/v1/runs/{run}/assignment?{name}=99999999999999999999"
        assert member.call("GET", path).status_code == 422
