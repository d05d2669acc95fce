"""A server that is killed between two rounds computes the same states as one that is not."""

from __future__ import annotations

import contextlib
import uuid

from protocol.federation import FederationSettings
from protocol.messages import JoinResponse, Results, Task
from protocol.plan import RunPlan
from split_server.client import read_token
from tests.e2e.conftest import ServerProcess
from tests.support.federation import OPERATOR, SMALL, random_state
from tests.support.server import ApiClient, RunningServer, wait_until

ROUNDS = 3

OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi")


class Device:
    """Sends one random update in each round, the same for each device."""

    def __init__(self, url: str, operator_token: str, optimizer: str) -> None:
        self.url, self.operator_token = url, operator_token
        settings = RunPlan(
            model=SMALL,
            federation=FederationSettings.model_validate(
                {"rounds": ROUNDS, "evaluate_every": 0, "server_optimizer": optimizer}
            ),
        )
        with self._api(operator_token) as operator:
            self.run = operator.create(settings, key=uuid.uuid4().hex).id
        with self._api() as api:
            response: JoinResponse = api.join(self.run)
        self.credential = response.credential

    def train(self, round_: int) -> None:
        with self._api(self.credential) as api:
            wait_until(lambda: api.assignment(self.run).task is Task.TRAIN)
            response = api.update(self.run, random_state(round_), f"u{round_}", round=round_)
            assert response.is_success, response.text

    def states(self) -> list[str]:
        with self._api(self.operator_token) as operator:
            response = operator.call("GET", f"/v1/runs/{self.run}/results")
        rounds = Results.model_validate(response.json()).rounds
        return [round_.state.sha256 for round_ in rounds if round_.state is not None]

    def _api(self, token: str | None = None) -> contextlib.closing[ApiClient]:
        return contextlib.closing(ApiClient(self.url, token))


def test_a_server_killed_between_rounds_ends_with_the_same_states(
    node: RunningServer, server: ServerProcess
) -> None:
    undisturbed = [Device(node.url, OPERATOR, name) for name in OPTIMIZERS]
    token = read_token(server.data_dir)
    disturbed = [Device(server.url, token, name) for name in OPTIMIZERS]
    for round_ in range(1, ROUNDS + 1):
        for device in undisturbed:
            device.train(round_)
    for round_ in range(1, ROUNDS + 1):
        if round_ == ROUNDS:
            server.kill_and_restart()
        for device in disturbed:
            device.train(round_)
    for first, second in zip(undisturbed, disturbed, strict=True):
        assert len(set(first.states())) == ROUNDS
        assert second.states() == first.states()
