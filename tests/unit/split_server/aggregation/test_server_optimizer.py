"""Server optimisers against values computed by hand, and their moments across restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import NonFinite, NotFound
from protocol.federation import FederationSettings
from protocol.messages import RunStatus, Task
from split_server.aggregation.server_optimizer import Moments, server_step
from split_server.federation import transitions
from split_server.storage.run_files import RunFiles
from tests.support.federation import FederationHarness, state_of, state_value

RATES = {"server_momentum": 0.9, "server_beta2": 0.99}


def settings(kind: str, **rates: float) -> FederationSettings:
    return FederationSettings.model_validate({"server_optimizer": kind, **RATES, **rates})


def steps(federation: FederationSettings, *gradients: float) -> list[float]:
    """Return a one-number state after each round, starting from 0."""
    state: dict[str, Tensor] = {"w": torch.zeros(1)}
    moments: Moments = {}
    reached = []
    for gradient in gradients:
        mean = {"w": state["w"] - gradient}
        state, moments = server_step(federation, state, mean, moments)
        reached.append(state["w"].item())
    return reached


@pytest.mark.parametrize(
    ("federation", "gradients", "expected"),
    [
        # 0 + 1; then the momentum is 0.9 * 1 + 0.5
        (settings("fedavgm"), (-1.0, -0.5), (1.0, 2.4)),
        (settings("fedavgm", server_learning_rate=0.5), (-1.0, -0.5), (0.5, 1.2)),
        # m / 0.1 = 2, v / 0.01 = 4: 0.1 * 2 / 2.001. Then m = 0.28, v = 0.0496; m / 0.19 =
        # 1.473684, v / 0.0199 = 2.492462, its root 1.578753: 0.1 * 1.473684 / 1.579753
        (
            settings("fedadam", server_learning_rate=0.1, server_tau=0.001),
            (-2.0, -1.0),
            (0.09995002, 0.09995002 + 0.09328575),
        ),
        # m = 0.2, v = 0.25 + 0.01 * 4: 0.02 / (0.5385165 + 0.5). Then m = 0.19,
        # v = 0.29 - 0.01 * 0.01: 0.019 / (0.5384236 + 0.5)
        (
            settings("fedyogi", server_learning_rate=0.1, server_tau=0.5),
            (-2.0, -0.1),
            (0.01925824, 0.01925824 + 0.01829697),
        ),
    ],
)
def test_two_rounds_computed_by_hand(
    federation: FederationSettings, gradients: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    assert steps(federation, *gradients) == pytest.approx(list(expected), rel=1e-5)


def test_default_rates() -> None:
    assert steps(settings("fedavgm"), -3.0) == [3.0]  # the mean itself
    for kind in ("fedadam", "fedyogi"):
        tau = 1e-6  # so small that the first step equals the rate
        own = settings(kind, server_tau=tau)
        given = settings(kind, server_tau=tau, server_learning_rate=0.01)
        assert steps(own, -3.0, -1.0) == steps(given, -3.0, -1.0)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedyogi"])
def test_moments_from_a_file_give_the_same_bits(tmp_path: Path, kind: str) -> None:
    files, generator = RunFiles(tmp_path), torch.Generator().manual_seed(0)

    def randn() -> dict[str, Tensor]:
        made = {"a": torch.randn(7, 3, generator=generator), "b.c/d": torch.randn(())}
        return {**made, "none": torch.zeros(0, 2)}

    start, means = randn(), [randn() for _ in range(4)]
    whole, remembered = dict(start), dict[str, Tensor]()
    stored = dict(start)
    for round_, mean in enumerate(means, start=1):
        whole, remembered = server_step(settings(kind), whole, mean, remembered)
        before = files.read_moments(round_ - 1)
        stored, moments = server_step(settings(kind), stored, mean, before)
        files.write_moments(round_, moments)
    assert all(torch.equal(stored[name], whole[name]) for name in start)
    assert sorted(path.name for path in (tmp_path / "moments").iterdir()) == [
        "3.safetensors",
        "4.safetensors",
    ]
    with pytest.raises(NotFound):
        files.read_moments(1)


def test_a_step_out_of_range_raises_a_typed_error() -> None:
    mean = {"w": torch.tensor([3e38])}
    with pytest.raises(NonFinite) as caught:
        server_step(settings("fedavgm", server_learning_rate=100), {"w": torch.zeros(1)}, mean, {})
    assert caught.value.field == "w"


def trained(
    harness: FederationHarness, run: str, participant: str, *means: float, first: int = 1
) -> None:
    """Let one participant send these means, one per round, and evaluate each state."""
    for round_, mean in enumerate(means, start=first):
        assert harness.task(run, participant).task is Task.TRAIN
        harness.update(run, participant, state_of(mean), round_=round_)
        assert harness.task(run, participant).task is Task.EVALUATE
        harness.evaluate(run, participant, round_=round_)


def test_a_restarted_run_continues_with_its_moments(tmp_path: Path, monkeypatch: Any) -> None:
    harness = FederationHarness(tmp_path)
    run = harness.create(rounds=3, server_optimizer="fedavgm")
    participant = harness.join(run)
    trained(harness, run, participant, 1.0)
    assert state_value(harness, run) == 1.0
    harness.task(run, participant)

    def crash(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:  # the moments are on disk, the state is not committed yet
        patch.setattr(transitions, "apply", crash)
        harness.update(run, participant, state_of(1.5), round_=2)
        assert state_value(harness, run) == 1.0
    harness.close()
    harness.open()
    assert harness.task(run, participant).task is Task.EVALUATE
    assert state_value(harness, run) == pytest.approx(2.4)  # 1 + 0.9 + 0.5
    harness.evaluate(run, participant, round_=2)
    harness.close()
    harness.open()
    trained(harness, run, participant, 2.4, first=3)
    assert state_value(harness, run) == pytest.approx(2.4 + 0.9 * 1.4)
    assert harness.runs.snapshot(run).status is RunStatus.FINISHED
    harness.close()


def test_lost_moments_fail_the_run_with_their_reason(tmp_path: Path) -> None:
    harness = FederationHarness(tmp_path)
    run = harness.create(rounds=3, server_optimizer="fedyogi")
    participant = harness.join(run)
    trained(harness, run, participant, 1.0)
    for path in (harness.runs.files(run).root / "moments").iterdir():
        path.unlink()
    harness.task(run, participant)
    harness.update(run, participant, state_of(1.5), round_=2)
    snapshot = harness.runs.snapshot(run)
    assert snapshot.status is RunStatus.FAILED
    assert "server optimiser" in str(snapshot.reason)
    harness.close()


def test_server_side_prompts_take_the_same_step(tmp_path: Path) -> None:
    harness = FederationHarness(tmp_path)
    run = harness.create(rounds=1, server_optimizer="fedavgm", prompt_at="cut", evaluate_every=0)
    participant = harness.join(run)
    harness.task(run, participant)
    state = {name: torch.full_like(value, 2.0) for name, value in harness.state(run).items()}
    prompts = {"prompts": state.pop("prompts")}
    harness.update(run, participant, state, trained=lambda: prompts)
    assert state_value(harness, run) == 2.0
    harness.close()
