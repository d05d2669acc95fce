"""A server that is killed between two rounds makes the same states as one that is not."""

from __future__ import annotations

import contextlib
import uuid

from protocol.federation import FederationSettings
from protocol.messages import JoinResponse, Results, Task
from protocol.plan import RunPlan
from split_server.client import read_token
from tests.e2e.conftest import ServerProcess
from tests.support.federation import SMALL, random_state
from tests.support.server import ApiClient, wait_until

ROUNDS = 3

KINDS = ("fedavgm", "fedadam", "fedyogi")


class Device:
    """Sends the same made-up update in each round, whatever becomes of the server."""

    def __init__(self, server: ServerProcess, kind: str) -> None:
        self.server = server
        settings = RunPlan(
            model=SMALL,
            federation=FederationSettings.model_validate(
                {"rounds": ROUNDS, "evaluate_every": 0, "server_optimizer": kind}
            ),
        )
        with self._api(read_token(server.data_dir)) as operator:
            self.run = operator.create(settings, key=uuid.uuid4().hex).id
        with self._api() as joiner:
            joined: JoinResponse = joiner.join(self.run)
        self.credential = joined.credential

    def train(self, round_: int) -> None:
        with self._api(self.credential) as api:
            wait_until(lambda: api.assignment(self.run).task is Task.TRAIN)
            answer = api.update(self.run, random_state(round_), f"u{round_}", round=round_)
            assert answer.is_success, answer.text

    def states(self) -> list[str]:
        with self._api(read_token(self.server.data_dir)) as operator:
            answer = operator.call("GET", f"/v1/runs/{self.run}/results")
        rounds = Results.model_validate(answer.json()).rounds
        return [one.state.sha256 for one in rounds if one.state is not None]

    def _api(self, token: str | None = None) -> contextlib.closing[ApiClient]:
        return contextlib.closing(ApiClient(self.server.url, token))


def test_a_killed_server_goes_on_bit_for_bit(server: ServerProcess) -> None:
    undisturbed, disturbed = ([Device(server, kind) for kind in KINDS] for _ in range(2))
    for round_ in range(1, ROUNDS + 1):
        for device in undisturbed:
            device.train(round_)
    for round_ in range(1, ROUNDS + 1):
        for device in disturbed:
            device.train(round_)
        if round_ < ROUNDS:
            server.process.kill()
            server.start()
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert len(set(one.states())) == ROUNDS
        assert other.states() == one.states()
