"""Noised rounds with real devices over HTTP: prompts at the cut and at the input."""

from __future__ import annotations

import contextlib
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from edge_client.data import Part, limit_per_set, load_dataset
from edge_client.data.dataset import Dataset
from edge_client.participant import Participant, succeeded
from edge_client.transport import Server
from protocol.messages import Results, RunStatus
from protocol.plan import RunPlan
from split_server.aggregation.differential_privacy import ORDERS
from split_server.client import OperatorClient
from split_server.federation.export import newest_state
from tests.e2e.conftest import small_run
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer, running_server
from tuning_methods.custom.settings import Custom

DEVICES, ROUNDS = 2, 2


class Silent:
    def event(self, kind: str, **data: Any) -> None: ...
    def advance(self, phase: str, done: int, total: int) -> None: ...
    def close(self) -> None: ...


def private_run(placement: str, **federation: Any) -> RunPlan:
    values = small_run(rounds=ROUNDS, devices=DEVICES).model_dump()
    values["model"]["prompt_at"] = placement
    values["federation"] |= {"round_timeout_s": 60, **federation}
    return RunPlan.model_validate(values)


def run_through(node: RunningServer, settings: RunPlan, home: Path) -> tuple[Results, str]:
    data = limit_per_set(load_dataset("digits"), train=40, test=20, seed=0)
    with contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator:
        run = operator.create_run(Custom.of(settings))
        done: list[bool] = []

        def take_part(number: int) -> None:
            part = Part(number, DEVICES)
            own = Dataset(part.take(data.train, "iid", 0), part.take(data.test, "iid", 0))
            with contextlib.closing(Server(node.url)) as client:
                device = Participant(client, own, home / str(number), f"d{number}", Silent())
                joined = device.join(run.id, key=f"join-{number}")
                done.append(succeeded(joined.take_part()))

        threads = [threading.Thread(target=take_part, args=(n + 1,)) for n in range(DEVICES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert done == [True] * DEVICES
        return operator.results(run.id), run.id


def by_hand(rounds: int, noise: float, delta: float) -> float:
    """Of the plain Gaussian mechanism, all participants being drawn."""
    return min(
        rounds * order / (2 * noise**2)
        + math.log((order - 1) / order)
        - math.log(delta * order) / (order - 1)
        for order in ORDERS
    )


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[n] - other[n]).double().square().sum()) for n in one))


@pytest.mark.parametrize("placement", ["input", "cut"])
def test_history_tells_epsilon_of_a_run_of_devices(tmp_path: Path, placement: str) -> None:
    with running_server(tmp_path / "node", max_batch_samples=1) as node:
        settings = private_run(placement, dp_clip=0.1, dp_noise_multiplier=1.5, dp_delta=1e-4)
        results, _ = run_through(node, settings, tmp_path / "noised")
        assert results.run.status is RunStatus.FINISHED
        told = [view.epsilon for view in results.rounds]
        assert told == [pytest.approx(by_hand(n, 1.5, 1e-4)) for n in range(1, ROUNDS + 1)]
        assert results.run.settings.federation.dp_seed is None

        # Without noise two rounds cannot lead further than two clips.
        folder = node.server._application.settings.data_dir
        settings = private_run(placement, dp_clip=0.1)
        start = private_run(placement, dp_clip=1e-6)  # stays where it begins
        results, moved = run_through(node, settings, tmp_path / "clipped")
        assert [view.epsilon for view in results.rounds] == [None] * ROUNDS
        _, still = run_through(node, start, tmp_path / "still")
        far = distance(newest_state(folder, moved)[1], newest_state(folder, still)[1])
        assert 0.02 < far <= ROUNDS * 0.1 * 1.001
