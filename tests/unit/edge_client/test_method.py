"""The device's side of a tuning method."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_client.method import DeviceMethod, RoundResult, device_method
from edge_client.training import RoundContext
from edge_client.training.split_training import Sample, TrainingResult
from edge_client.transport.split_client import SplitPlane
from protocol.plan import RunPlan
from protocol.settings import RunSettings
from tests.support.edge import BodyServer, round_context


class RecordingMethod(DeviceMethod):
    """Records the order of the overridable steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def local_forward(self, context: RoundContext, smashed: Tensor) -> Tensor:
        self.steps.append("local_forward")
        return super().local_forward(context, smashed)

    def split_train(
        self, context: RoundContext, plane: SplitPlane, selected: Tensor
    ) -> TrainingResult:
        self.steps.append(f"split_train {len(selected)}")
        return super().split_train(context, plane, selected)

    def update_extras(self, context: RoundContext, selected: Tensor) -> dict[str, Tensor]:
        self.steps.append(f"update_extras {len(selected)}")
        return {"extra": torch.ones(2)}


def train(method: DeviceMethod, **training: Any) -> RoundResult:
    return method.train_round(round_context(**training), BodyServer().plane)


def test_a_round_runs_every_step_in_order() -> None:
    method = RecordingMethod()
    result = train(method, keep_fraction=0.5)
    assert method.steps == [*["local_forward"] * 3, "split_train 5", "update_extras 5"]
    assert result.samples == 5
    assert result.local_loss is not None
    assert result.train_loss is not None
    assert result.session is None
    assert np.array_equal(result.extras["extra"], torch.ones(2))


def test_without_samples_nothing_is_trained() -> None:
    method = RecordingMethod()
    result = train(method, samples=0)
    assert method.steps == ["update_extras 0"]
    assert (result.samples, result.local_loss, result.train_loss) == (0, None, None)


def test_the_default_method_goes_from_head_straight_to_tail_and_sends_no_extras() -> None:
    method, context = device_method(RunSettings()), round_context()
    assert type(method) is DeviceMethod
    smashed = torch.randn(2, 9, 64)
    assert torch.equal(method.local_forward(context, smashed), context.model.tail(smashed))
    assert method.update_extras(round_context(), np.arange(3)) == {}


class HalvingMethod(DeviceMethod):
    """Sends half the smashed data, and records samples and names of the steps."""

    def __init__(self, fixed_views: bool) -> None:
        self.fixed_views = fixed_views
        self.steps: list[tuple[Sequence[Sample], str]] = []

    def forward(
        self,
        context: RoundContext,
        plane: SplitPlane,
        samples: Sequence[Sample],
        smashed: Tensor,
        step: str,
    ) -> tuple[Tensor, Tensor | None]:
        assert not smashed.requires_grad
        self.steps.append((samples, step))
        return super().forward(context, plane, samples, smashed / 2, step)

    def uses_fixed_views(self, run: RunPlan) -> bool:
        return self.fixed_views


@pytest.mark.parametrize("fixed_views", [False, True])
def test_a_method_decides_how_smashed_data_are_sent(fixed_views: bool) -> None:
    training = {"keep_fraction": 1.0, "split_epochs": 3, "augment": True, "views": 2}
    method, context = HalvingMethod(fixed_views), round_context(samples=4, **training)
    epochs: list[int] = []
    read = context.samples.images.read

    def recording_read(positions: Tensor, *, epoch: int) -> tuple[Tensor, Tensor]:
        epochs.append(epoch)
        return read(positions, epoch=epoch)

    context.samples.images.read = recording_read  # type: ignore[method-assign]
    server = BodyServer(lose=1)
    method.split_train(context, server.plane, np.arange(4))
    views = [view for samples, _ in method.steps for _, view in samples]
    # One local epoch comes first; the first step is lost and sent again under another name.
    assert views == [1] * 8 + [0] * 4 + [1] * 4
    assert [sorted(position for position, _ in samples) for samples, _ in method.steps] == [
        [0, 1, 2, 3]
    ] * 4
    assert len({step for _, step in method.steps}) == 4
    assert epochs == ([1, 0, 1] if fixed_views else [1, 2, 3])
