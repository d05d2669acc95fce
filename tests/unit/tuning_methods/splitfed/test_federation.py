"""Tuned bodies are a part of the global state: averaged by weight, restored after a restart."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import StepLost, WrongShape
from protocol.messages import RunStatus, Task
from protocol.plan import RunPlan
from split_model.checkpoints.state import load_state
from split_server.federation import transitions
from split_server.federation.export import newest_state
from split_server.storage.events import IdempotentRequest
from tests.support.federation import SMALL, FederationHarness, run_settings, state_of, state_value
from tuning_methods.custom.settings import Custom

MODEL = SMALL.model_copy(update={"prompt_count": 0, "tune": "full", "tune_body": True, "cut": 10})

SPLIT = MODEL


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[FederationHarness]:
    harness = FederationHarness(tmp_path)
    yield harness
    harness.close()


def created(
    harness: FederationHarness, wire: dict[str, Any] | None = None, **federation: Any
) -> str:
    plain = run_settings(wire=wire, **federation)
    settings = RunPlan.model_validate({**plain.model_dump(), "model": MODEL.model_dump()})
    return harness.federation.create(
        Custom.of(settings), IdempotentRequest.of("create", uuid.uuid4().hex)
    ).id


def parts_of(value: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state filled with ``value``: the device's part, and the body."""
    state = state_of(value, SPLIT)
    body = {name: tensor for name, tensor in state.items() if name.startswith("body.")}
    return {name: state[name] for name in state.keys() - body.keys()}, body


def send(
    harness: FederationHarness, run: str, who: str, value: float, samples: int = 10, round_: int = 1
) -> None:
    sent, body = parts_of(value)
    harness.update(run, who, sent, samples=samples, round_=round_, trained=lambda: body)


@pytest.mark.parametrize("wire", [{}, {"update_deltas": True, "updates": "float16"}])
def test_bodies_are_averaged_as_the_devices_part_is(
    harness: FederationHarness, wire: dict[str, Any]
) -> None:
    """Both files hold the mean, (10 x 2 + 30 x 6) / 40 = 5."""
    run = created(harness, wire, min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.task(run, a), harness.task(run, b)
    send(harness, run, b, 6.0, samples=30)
    send(harness, run, a, 2.0, samples=10)
    assert state_value(harness, run) == 5.0
    snapshot = harness.runs.snapshot(run)
    assert snapshot.state.server is not None
    device = load_state(harness.runs.files(run).state(snapshot.state.device.sha256))
    server = load_state(harness.runs.files(run).server_state(snapshot.state.server.sha256))
    sent, body = parts_of(0.0)
    assert (device.keys(), server.keys()) == (sent.keys(), body.keys())


def test_an_update_without_its_body_is_not_counted(harness: FederationHarness) -> None:
    run = created(harness)
    a = harness.join(run)
    harness.task(run, a)

    def lost() -> dict[str, Tensor]:
        raise StepLost("the session is lost")

    with pytest.raises(StepLost):
        harness.update(run, a, parts_of(1.0)[0], trained=lost)
    assert harness.task(run, a).task is Task.TRAIN, "it may start the round again"
    with pytest.raises(WrongShape):  # a device does not send a body
        harness.update(run, a, state_of(1.0, SPLIT), trained=lost)
    assert harness.kinds(run).count("update_counted") == 0


def test_a_server_killed_before_a_state_counts_computes_it_again(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedAvgM: 0 to 1; then the momentum is 0.9 x 1 + 0.5, so 1 to 2.4."""
    run = created(harness, rounds=2, server_optimizer="fedavgm", evaluate_every=0)
    a = harness.join(run)
    harness.task(run, a)
    send(harness, run, a, 1.0)
    assert state_value(harness, run) == 1.0
    harness.task(run, a)

    def crash(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(transitions, "apply", crash)
        send(harness, run, a, 1.5, round_=2)
    assert state_value(harness, run) == 1.0
    harness.close()
    harness.open()
    harness.task(run, a)
    assert state_value(harness, run) == pytest.approx(2.4)
    finished, state = newest_state(harness.folder, run)
    assert finished.status is RunStatus.FINISHED
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in state_of(0.0, SPLIT).items()
    }
    assert all(torch.allclose(tensor, torch.tensor(2.4)) for tensor in state.values())


def test_bodies_of_earlier_rounds_are_deleted(harness: FederationHarness) -> None:
    run = created(harness, rounds=4, evaluate_every=0)
    a = harness.join(run)
    for round_ in (1, 2, 3):
        harness.task(run, a)
        send(harness, run, a, float(round_), round_=round_)
    files, snapshot = harness.runs.files(run), harness.runs.snapshot(run)
    assert snapshot.state.server is not None
    bodies = {path.stem for path in (files.root / "held").iterdir()}
    assert snapshot.state.server.sha256 in bodies
    assert len(bodies) <= 2, "of four states"
    assert len(list((files.root / "states").iterdir())) == 4, "devices can download earlier states"
    harness.close()
    harness.open()
    assert {path.stem for path in (files.root / "held").iterdir()} == {snapshot.state.server.sha256}
