"""The SplitFed methods' measured bytes at the socket, compared with the calculated ones."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from edge_client.data.dataset import Dataset
from edge_client.participant import Participant
from edge_client.transport.client import Server
from protocol.federation import FederationSettings
from protocol.messages import Results, RunStatus
from protocol.parts import BackboneSettings
from protocol.settings import RunSettings
from sfprompt_bench.compare.metrics import calculated, run_figures
from sfprompt_bench.compare.usage import Usage
from sfprompt_bench.methods.registry import ESTIMATED
from tests.support.edge import image_set
from tests.support.reporters import SilentReporter
from tests.support.server import running_server

SAMPLES, BATCH, ROUNDS = 24, 8, 2

MODEL = BackboneSettings(
    backbone="vit_tiny_patch16_224", weights="random:0", image_size=64, num_classes=3
)

MAX_HEADER_BYTES = 1500  # of a request or its response, in one direction

LEGS = {
    "splitfed-full": {"smashed", "features", "gradients"},
    # Only the tail is tuned, so no gradient is sent.
    "splitfed-linear": {"smashed", "features"},
}


@pytest.mark.parametrize("name", LEGS)
def test_the_bytes_of_start_and_training_are_the_calculated_ones(name: str, tmp_path: Path) -> None:
    method = ESTIMATED[name]
    base = RunSettings(model=MODEL, federation=FederationSettings(rounds=ROUNDS))
    settings = method.settings(base, {"training": {"batch_size": BATCH}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with running_server(tmp_path / "node") as server:
        operator = server.operator()
        run = operator.create(settings)
        data = Dataset(image_set(SAMPLES), image_set(5, seed=1))
        with contextlib.closing(Server(server.url)) as client:
            participant = Participant(client, data, tmp_path / "blobs", "only", SilentReporter())
            joined = participant.join(run.id, key="join")
            assert joined.take_part().status is RunStatus.FINISHED
        response = operator.call("GET", f"/v1/runs/{run.id}/results")
        results = Results.model_validate(response.json())
    torch.set_num_threads(threads)

    split = results.traffic.keys() & {"smashed", "features", "gradients"}
    assert split == LEGS[name]
    usage = Usage(0, 0.0)
    measured = run_figures(
        results,
        seconds=1.0,
        trainable_parameters=0,
        devices=[usage],
        server=usage,
        by_device={},
    )
    expected = calculated(method, settings.plan, results)["calculated"]
    requests = 2 * SAMPLES // BATCH + 2  # in a round, with those of the state and the update
    for field in ("bytes_up_per_round", "bytes_down_per_round"):
        extra = 40_000 if name == "splitfed-full" else 4_000  # the tensors' names in state files
        assert (
            expected[field]
            <= measured[field]
            <= expected[field] + requests * MAX_HEADER_BYTES + extra
        )
    assert expected["bytes_start"] <= measured["bytes_start"] <= expected["bytes_start"] + 40_000
