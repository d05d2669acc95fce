"""Clipped and noised means against hand-computed ones, recorded epsilons, and secret sampling."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.errors import EmptyUpdate, InvalidField, NonFinite, WrongShape
from protocol.messages import Results, RunStatus, Task, parse_message
from protocol.plan import RunPlan
from split_server.aggregation.differential_privacy import (
    clip_change,
    compute_epsilon,
    draw_normal,
    private_mean,
)
from split_server.aggregation.fedavg import WeightedState, federated_average
from split_server.commands.runs import _rounds_table
from split_server.federation.rounds import OpenTraining
from tests.support.federation import FederationHarness, random_state, state_of
from tests.unit.split_server.federation.test_rounds import a_run, next_step


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_of(
    *updates: dict[str, Tensor],
    state: dict[str, Tensor],
    clip: float,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    loads = [lambda own=own: own for own in updates]
    return private_mean(
        loads, state, clip=clip, noise_multiplier=noise, generator=generator or seeded()
    )


def length(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def test_changes_are_clipped_over_all_tensors_and_weigh_the_same() -> None:
    state = {"w": torch.tensor([1.0, 1.0]), "v": torch.tensor([2.0])}
    # (3, 0 | 4) has the length 5 and becomes (0.6, 0 | 0.8); (0, 0.5 | 0) stays
    long = {"w": torch.tensor([4.0, 1.0]), "v": torch.tensor([6.0])}
    short = {"w": torch.tensor([1.0, 1.5]), "v": torch.tensor([2.0])}
    mean = mean_of(long, short, state=state, clip=1.0)
    assert mean["w"].tolist() == pytest.approx([1.3, 1.25])
    assert mean["v"].tolist() == pytest.approx([2.4])
    assert mean["w"].dtype is torch.float32


def test_an_update_without_a_change_stays_unchanged() -> None:
    state = random_state(1)
    mean = mean_of(state, state, state=state, clip=1e-3)
    assert all(torch.equal(mean[name], value) for name, value in state.items())
    zero = {"w": torch.zeros(3, dtype=torch.float64)}
    assert torch.equal(clip_change(zero, 1e-9)["w"], zero["w"])


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=8),
    clip=st.floats(1e-6, 1e6),
)
def test_clipping_keeps_the_direction_and_bounds_the_norm(values: list[float], clip: float) -> None:
    half = len(values) // 2
    change = {
        "a": torch.tensor(values[:half], dtype=torch.float64),
        "b": torch.tensor(values[half:], dtype=torch.float64),
    }
    short = clip_change(change, clip)
    before, after = length(change), length(short)
    assert after <= clip * (1 + 1e-12)
    assert after == pytest.approx(min(before, clip))
    for name, tensor in change.items():
        torch.testing.assert_close(short[name] * before, tensor * after, rtol=1e-9, atol=0)


def test_without_noise_and_with_a_huge_clip_it_is_the_mean_of_equal_weights() -> None:
    state, updates = random_state(0), [random_state(seed) for seed in (1, 2, 3)]
    mean = mean_of(*updates, state=state, clip=1e6)
    plain = federated_average(WeightedState(1, lambda own=own: own) for own in updates)
    for name, value in plain.items():
        torch.testing.assert_close(mean[name], value, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("generator", [seeded(3), None], ids=["seed", "entropy"])
def test_noise_has_the_stated_deviation(generator: torch.Generator | None) -> None:
    state = {"w": torch.zeros(500, 500), "empty": torch.zeros(0, 2)}
    loads = [lambda: state] * 4
    mean = private_mean(loads, state, clip=2.0, noise_multiplier=1.5, generator=generator)
    noise = mean["w"].double() / (1.5 * 2.0 / 4)
    # Of 250,000 standard normal numbers: errors are below 0.002, 0.0015 and 0.01.
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.015
    assert abs(float((noise**4).mean()) - 3) < 0.1
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < 0.02
    assert mean["empty"].shape == (0, 2)


def test_a_seed_repeats_the_noise_and_entropy_never_does() -> None:
    shape = torch.Size([1000])
    assert torch.equal(draw_normal(shape, seeded(1)), draw_normal(shape, seeded(1)))
    assert not torch.equal(draw_normal(shape, None), draw_normal(shape, None))
    assert bool(torch.isfinite(draw_normal(torch.Size([100_000]), None)).all())


@pytest.mark.parametrize(
    ("state", "updates", "error", "field"),
    [
        ({"w": torch.zeros(1)}, [], EmptyUpdate, "updates"),
        ({"w": torch.zeros(1)}, [{"v": torch.zeros(1)}], WrongShape, "tensors"),
        ({"w": torch.zeros(1)}, [{"w": torch.zeros(2)}], WrongShape, "w"),
        ({"w": torch.zeros(1)}, [{"w": torch.tensor([math.nan])}], NonFinite, "update"),
        ({"num_batches_tracked": torch.tensor(3)}, [], InvalidField, "num_batches_tracked"),
        (
            {"num_batches_tracked": torch.tensor(3.0)},
            [{"num_batches_tracked": torch.tensor(4)}],
            InvalidField,
            "num_batches_tracked",
        ),
    ],
)
def test_unsuitable_updates_are_refused_by_name(
    state: dict[str, Tensor],
    updates: list[dict[str, Tensor]],
    error: type[Exception],
    field: str,
) -> None:
    with pytest.raises(error) as caught:
        mean_of(*updates, state=state, clip=1.0)
    assert getattr(caught.value, "field", None) == field


def test_noise_out_of_range_is_a_typed_error() -> None:
    state = {"w": torch.full((100,), 3.4e38)}
    with pytest.raises(NonFinite):
        mean_of(state, state=state, clip=1e38, noise=1000.0)


# Settings


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"federation": {"dp_noise_multiplier": 1.0}}, "dp_clip"),
        ({"federation": {"dp_clip": 0}}, "dp_clip"),
        ({"federation": {"dp_clip": 1, "dp_delta": 0}}, "dp_delta"),
        ({"federation": {"dp_clip": 1}, "model": {"prompt_init": "mean-token"}}, "mean-token"),
    ],
)
def test_contradictory_settings_are_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidField, match=named):
        parse_message(RunPlan, changed)


# Runs


def trained(
    harness: FederationHarness, run: str, participant: str, value: float, round_: int
) -> None:
    assert harness.task(run, participant).task is Task.TRAIN
    harness.update(run, participant, state_of(value), round_=round_)


def view(harness: FederationHarness, run: str) -> Results:
    return harness.reader.results(run)


NOISED = {"dp_clip": 0.5, "dp_noise_multiplier": 2.0, "dp_delta": 1e-2, "evaluate_every": 0}


def test_events_record_epsilon_after_each_round_also_after_a_restart(tmp_path: Path) -> None:
    harness = FederationHarness(tmp_path)
    run = harness.create(rounds=3, **NOISED)
    participant = harness.join(run)
    for round_ in (1, 2, 3):
        trained(harness, run, participant, 1.0, round_)
        harness.close()
        harness.open()
    told = [one.epsilon for one in view(harness, run).rounds]
    # Hand-worked for one round at order 7, see test_server_accountant.
    assert told[0] is not None
    assert told[0] <= 1.1640594
    assert told == [pytest.approx(compute_epsilon([1.0] * n, 2.0, 1e-2)) for n in (1, 2, 3)]
    assert told == sorted(told)
    assert len(set(told)) == 3
    events = [e.data for e in harness.reader.events(run, 0) if e.kind == "privacy_spent"]
    assert [event["epsilon"] for event in events] == told
    assert [(event["delta"], event["sampling_rate"]) for event in events] == [(1e-2, 1.0)] * 3
    assert harness.runs.snapshot(run).status is RunStatus.FINISHED
    shown = _rounds_table(view(harness, run)).columns[-1]
    assert [shown.header, *shown.cells] == ["epsilon", *(f"{epsilon:.2f}" for epsilon in told)]
    harness.close()


def test_sampling_costs_less_and_a_repeated_round_nothing(
    tmp_path: Path,
) -> None:
    with closing(FederationHarness(tmp_path)) as harness:
        run = harness.create(
            rounds=1, min_participants=2, participants_per_round=1, round_timeout_s=9, **NOISED
        )
        members = [harness.join(run, name) for name in "ab"]
        drawn = [m for m in members if harness.task(run, m).task is Task.TRAIN]
        assert len(drawn) == 1
        harness.time.now += 10  # nobody answers, and both are there
        for member in members:
            harness.liveness.touch(run, member)
        drawn = [m for m in members if harness.task(run, m).task is Task.TRAIN]
        harness.update(run, drawn[0], state_of(1.0), attempt=1)
        first, second = view(harness, run).rounds
        assert first.epsilon is None
        assert second.epsilon == pytest.approx(compute_epsilon([1.0], 2.0, 1e-2))
        (event,) = [e.data for e in harness.reader.events(run, 0) if e.kind == "privacy_spent"]
        assert event["sampling_rate"] == 0.5
        assert event["epsilon_secret_sample"] == pytest.approx(compute_epsilon([0.5], 2.0, 1e-2))


def change(harness: FederationHarness, run: str) -> float:
    return length(harness.state(run))  # from zeros


@pytest.mark.parametrize("placement", ["input", "cut"])
def test_the_complete_update_is_clipped_for_both_placements(tmp_path: Path, placement: str) -> None:
    with closing(FederationHarness(tmp_path)) as harness:
        run = harness.create(rounds=1, dp_clip=0.25, prompt_at=placement, evaluate_every=0)
        participant = harness.join(run)
        harness.task(run, participant)
        state = {name: torch.full_like(t, 3.0) for name, t in harness.state(run).items()}
        prompts = {"prompts": state.pop("prompts")} if placement == "cut" else {}
        harness.update(run, participant, state, trained=(lambda: prompts) if prompts else None)
        assert change(harness, run) == pytest.approx(0.25, rel=1e-5)
        assert bool(harness.state(run)["prompts"].ne(0).all())
        assert view(harness, run).rounds[0].epsilon is None  # clipping alone is no privacy


def test_private_updates_have_equal_weights(tmp_path: Path) -> None:
    with closing(FederationHarness(tmp_path)) as harness:
        run = harness.create(rounds=1, min_participants=2, dp_clip=1e6, evaluate_every=0)
        members = [harness.join(run, name) for name in "ab"]
        for member, value, samples in zip(members, (1.0, 2.0), (1, 99), strict=True):
            harness.task(run, member)
            harness.update(run, member, state_of(value), samples=samples)
        assert float(harness.state(run)["prompts"].mean()) == pytest.approx(1.5)


def test_the_server_optimiser_uses_the_noised_mean(tmp_path: Path) -> None:
    """FedAvgM at rate 1: the first state is the mean, the second adds 0.9 of the first change."""

    def states(**federation: Any) -> list[dict[str, Tensor]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        reached = []
        with closing(FederationHarness(folder)) as harness:
            run = harness.create(rounds=2, dp_seed=4, **NOISED, **federation)
            participant = harness.join(run)
            for round_ in (1, 2):
                base = harness.state(run)
                assert harness.task(run, participant).task is Task.TRAIN
                harness.update(run, participant, base, round_=round_)  # no change: noise alone
                reached.append(harness.state(run))
        return reached

    plain, stepped = states(), states(server_optimizer="fedavgm")
    for name, first in plain[0].items():
        torch.testing.assert_close(stepped[0][name], first)
        second = plain[1][name] + 0.9 * first
        torch.testing.assert_close(stepped[1][name], second, rtol=1e-4, atol=1e-5)
    numbers = torch.cat([tensor.flatten() for tensor in plain[0].values()])
    assert float(numbers.std()) == pytest.approx(2.0 * 0.5, rel=0.06)  # of 2,700 numbers


def drawn(seed: int, **federation: Any) -> set[tuple[str, ...]]:
    run = a_run(10, participants_per_round=5, **federation)
    samplings = set()
    for _ in range(seed):
        step = next_step(run)
        assert isinstance(step, OpenTraining)
        samplings.add(step.sampled)
    return samplings


def test_the_private_sample_cannot_be_predicted_from_the_settings() -> None:
    private = {"dp_clip": 1.0, "dp_noise_multiplier": 1.0}
    assert len(drawn(20, **private)) > 1
    assert drawn(20, **private, dp_seed=1) == drawn(1)
    assert len(drawn(20, dp_clip=1.0)) == 1
