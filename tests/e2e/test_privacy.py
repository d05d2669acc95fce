"""Rounds with noise, with real devices over HTTP: prompts at the cut and at the input."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from protocol.messages import Results, RunStatus
from protocol.plan import RunPlan
from split_server.aggregation.differential_privacy import ORDERS
from split_server.client import OperatorClient
from split_server.federation.export import newest_state
from tests.e2e.conftest import data_dir_of, small_run
from tests.e2e.devices import DeviceThreads, run_to_the_end
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer

DEVICES, ROUNDS = 2, 2


def private_run(placement: str, **federation: Any) -> RunPlan:
    values = small_run(rounds=ROUNDS, devices=DEVICES).model_dump()
    values["model"]["prompt_at"] = placement
    values["federation"] |= {"round_timeout_s": 60, **federation}
    return RunPlan.model_validate(values)


def complete_run(
    node: RunningServer, settings: RunPlan, home: Path
) -> tuple[Results, dict[str, Tensor]]:
    """Return the results, and the state before the first round."""
    initial: dict[str, Tensor] = {}

    def start(run: str) -> DeviceThreads:
        initial.update(newest_state(data_dir_of(node), run)[1])
        return DeviceThreads(node.url, run, DEVICES, home, train=40, test=20)

    with contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator:
        results, _ = run_to_the_end(operator, settings, start)
    assert results.run.status is RunStatus.FINISHED
    return results, initial


def gaussian_epsilon(rounds: int, noise: float, delta: float) -> float:
    """The plain Gaussian mechanism's epsilon when each participant is in each round."""
    return min(
        rounds * order / (2 * noise**2)
        + math.log((order - 1) / order)
        - math.log(delta * order) / (order - 1)
        for order in ORDERS
    )


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return math.sqrt(sum(float((first[n] - second[n]).double().square().sum()) for n in first))


@pytest.mark.parametrize("placement", ["input", "cut"])
def test_the_results_report_epsilon_for_each_round(
    node: RunningServer, tmp_path: Path, placement: str
) -> None:
    settings = private_run(placement, dp_clip=0.1, dp_noise_multiplier=1.5, dp_delta=1e-4)
    results, _ = complete_run(node, settings, tmp_path)
    reported = [view.epsilon for view in results.rounds]
    assert reported == [pytest.approx(gaussian_epsilon(n, 1.5, 1e-4)) for n in range(1, ROUNDS + 1)]
    assert results.run.settings.federation.dp_seed is None


@pytest.mark.parametrize("placement", ["input", "cut"])
def test_without_noise_each_round_moves_the_state_by_at_most_the_clip(
    node: RunningServer, tmp_path: Path, placement: str
) -> None:
    results, before = complete_run(node, private_run(placement, dp_clip=0.1), tmp_path)
    assert [view.epsilon for view in results.rounds] == [None] * ROUNDS
    after = newest_state(data_dir_of(node), results.run.id)[1]
    assert 0.02 < distance(after, before) <= ROUNDS * 0.1 * 1.001
