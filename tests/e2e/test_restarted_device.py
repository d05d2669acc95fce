"""A device that ends in the middle of a run and starts again: the run is the undisturbed one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.data.partition import Part
from edge_client.participant import JoinedRun, Participant
from edge_client.transport.client import Server
from protocol.messages import Results, RunStatus
from protocol.settings import RunSettings
from split_server.client import OperatorClient
from tests.e2e.devices import TIMEOUT_S, own_data
from tests.support.federation import OPERATOR
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer

TRAIN, TEST = 60, 20

SETTINGS = RunSettings.model_validate(
    {  # the default form, with changes of the state that lose much on the wire
        "model": {"backbone": "test_vit", "weights": "random:3", "image_size": 32},
        "method": {"name": "sfprompt", "rank": 16},
        "federation": {"rounds": 2, "min_participants": 2},
        "wire": {"updates": "topk:0.25"},
    }
)


class _Killed(BaseException):
    """Ends a device's thread where it is, without any of its own handlers."""


def run_with(node: RunningServer, start_first: Callable[[str], Any], home: Path) -> Results:
    """Run with a first device of the caller's, and a second one that nothing happens to."""
    with closing(OperatorClient(node.url, OPERATOR)) as operator:
        run = operator.create_run(SETTINGS).id
        second = threading.Thread(target=take_part, args=(node.url, run, 2, home), daemon=True)
        second.start()
        start_first(run)
        give_up_at = time.monotonic() + TIMEOUT_S
        while not operator.results(run).run.status.is_over:
            assert time.monotonic() < give_up_at, "the run does not end"
            time.sleep(0.05)
        second.join(TIMEOUT_S)
        return operator.results(run)


def take_part(
    url: str,
    run: str,
    number: int,
    home: Path,
    prepare: Callable[[JoinedRun], None] = lambda _joined: None,
) -> None:
    torch.set_num_threads(1)
    name = f"device-{number}"
    data = own_data(Part(number, 2), TRAIN, TEST)
    with closing(Server(url)) as client:
        device = Participant(client, data, home / name, name, SilentReporter())
        joined = device.join(run, key=f"join-{name}")
        prepare(joined)
        joined.take_part()


@pytest.fixture(scope="module")
def undisturbed(node: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Results:
    home = tmp_path_factory.mktemp("undisturbed")
    return run_with(node, lambda run: take_part(node.url, run, 1, home), home)


def assert_same(disturbed: Results, undisturbed: Results) -> None:
    assert disturbed.run.status is RunStatus.FINISHED
    assert [view.state for view in disturbed.rounds] == [view.state for view in undisturbed.rounds]
    assert [view.accuracy for view in disturbed.rounds] == [
        view.accuracy for view in undisturbed.rounds
    ]


@pytest.mark.parametrize(
    ("round_", "arrived"),
    [(0, False), (1, True)],
    ids=["in round 0, before it is sent", "in round 1, after it is counted"],
)
def test_a_device_killed_with_an_update_under_way_continues_as_if_it_had_not(
    node: RunningServer, undisturbed: Results, tmp_path: Path, round_: int, *, arrived: bool
) -> None:
    def kill(joined: JoinedRun) -> None:
        send = joined._server.send_update

        def send_and_die(run: str, meta: Any, *rest: Any) -> Any:
            if meta.round != round_:
                return send(run, meta, *rest)
            if arrived:
                send(run, meta, *rest)
            raise _Killed

        joined._server.send_update = send_and_die  # type: ignore[method-assign]
        joined._server.end = lambda *_: None  # type: ignore[method-assign] - it tells nobody

    def start(run: str) -> None:
        with pytest.raises(_Killed):
            take_part(node.url, run, 1, tmp_path, kill)
        take_part(node.url, run, 1, tmp_path)

    assert_same(run_with(node, start, tmp_path), undisturbed)
    assert not list((tmp_path / "device-1" / "runs").iterdir()), "nothing is left of a run's end"
