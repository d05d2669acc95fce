"""Attacks on runs with a closed-form start, where the server knows what each device can send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.errors import InvalidField
from protocol.settings import RunSettings
from sfprompt_bench.poison.federation import LocalFederation, local_federation
from split_model.linear_fit import Features, step_classifier
from split_model.parts.depths import feature_shape
from split_server.closed_form.basis import Basis
from split_server.closed_form.classifier import FeatureSums, fit_classifier
from split_server.closed_form.known import KnownSamples, write_known
from split_server.closed_form.result import Solved, write_solved
from split_server.closed_form.sums import Sums
from split_server.closed_form.tokens import require_own_ids
from split_server.federation.snapshot import Participant
from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT

CLASSES, RANK, DEVICES, EACH, CLAIMED = 4, 16, 3, 40, 100_000

PLAN = RunSettings.model_validate(
    {
        "model": {
            "backbone": "test_vit",
            "weights": "random:0",
            "image_size": 32,
            "num_classes": CLASSES,
        },
        "method": {"name": "sfprompt", "rank": RANK},
        "federation": {"rounds": 2, "min_participants": DEVICES, "evaluate_every": 0},
        "wire": {"updates": "float32"},
    }
).plan

LABELS = torch.arange(DEVICES * EACH) % CLASSES

GENERATOR = torch.Generator().manual_seed(0)

VALUES = torch.randn(CLASSES, RANK, generator=GENERATOR)[LABELS] + torch.randn(
    DEVICES * EACH, RANK, generator=GENERATOR
)


def sums_of(values: Tensor, labels: Tensor) -> Sums:
    one_hot = F.one_hot(labels, CLASSES).double()
    return Sums((one_hot.T @ values.double()).float(), one_hot.sum(dim=0).float())


@dataclass
class Run:
    """A run in round 1; device 0 is hostile and has joined with far more samples than it sent."""

    federation: LocalFederation
    solved: Solved
    counts: list[int]

    def honest(self, place: int) -> dict[str, Tensor]:
        """The update of an honest device, by the device's own code."""
        part = slice(place * EACH, (place + 1) * EACH)
        mean, variances = self.solved.mean.float(), self.solved.variances.float()
        state = self.federation.state()
        decay = self.solved.classifier.strength / self.solved.classifier.count / 8
        features = Features(VALUES[part].numpy(), mean.numpy(), variances.numpy(), 0.0)
        tail, _ = step_classifier(
            state[TAIL_WEIGHT].numpy(), state[TAIL_BIAS].numpy(),
            features, LABELS[part].numpy(), decay,
        )  # fmt: skip
        weight, bias = (torch.from_numpy(array).float() for array in tail)
        return {TAIL_WEIGHT: weight, TAIL_BIAS: bias}

    def refused(self) -> list[tuple[str, ...]]:
        """Of rounds 0 and 1."""
        return [view.refused for view in self.federation.rounds()][:2]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    assert feature_shape(PLAN.model)[1] == RANK
    counts = [CLAIMED, EACH, EACH]
    with local_federation(tmp_path, PLAN, counts) as federation:
        values = VALUES.double()
        mean = values.mean(dim=0)
        moments = FeatureSums(len(values), mean, (values - mean).T @ (values - mean))
        own, ones = sums_of(VALUES, LABELS), torch.ones(RANK, dtype=torch.float64)
        fit = fit_classifier(moments, own.features.double(), own.counts.double(), ones)
        basis = Basis(mean.float(), torch.eye(RANK), ones)
        solved = Solved(basis, fit, mean, moments.variances)
        files = federation.runs.files(federation.run)
        for place, participant in enumerate(federation.participants):
            part = slice(place * EACH, (place + 1) * EACH)
            known = KnownSamples(VALUES[part], sums_of(VALUES[part], LABELS[part]))
            write_known(files.known(0, participant), known)
        write_solved(files.basis(0), solved)
        start = {TAIL_WEIGHT: 5 * fit.weight, TAIL_BIAS: 5 * fit.bias}
        federation.send(dict.fromkeys(range(DEVICES), start), counts)
        yield Run(federation, solved, counts)


def test_a_declared_number_of_samples_gives_no_more_weight_than_those_that_were_sent(
    run: Run,
) -> None:
    """Tried: a device joins with 100,000 samples, sends 40, and names 100,000 as its weight.
    Stopped by: the weight is bounded by the samples whose features the server has computed."""
    updates = {place: run.honest(place) for place in range(DEVICES)}
    run.federation.send(updates, run.counts)
    mean = torch.stack([update[TAIL_WEIGHT] for update in updates.values()]).mean(dim=0)
    torch.testing.assert_close(run.federation.state()[TAIL_WEIGHT], mean, atol=1e-4, rtol=1e-3)
    assert run.refused() == [(), ()]


@pytest.mark.parametrize("factor", [-9.0, 0.2, 5.0])
def test_one_device_alone_cannot_move_the_model_but_by_its_own_step(
    run: Run, factor: float
) -> None:
    """Tried: a step turned around, or of another length, within the bound of lengths. Stopped by:
    the server computes the step from the device's sums, and leaves out the update."""
    before = run.federation.state()
    updates = {place: run.honest(place) for place in range(DEVICES)}
    updates[0] = {
        name: before[name] + factor * (updates[0][name] - before[name]) for name in before
    }
    run.federation.send(updates, run.counts)
    assert run.refused() == [(), (run.federation.participants[0],)]
    mean = torch.stack([updates[place][TAIL_WEIGHT] for place in (1, 2)]).mean(dim=0)
    torch.testing.assert_close(run.federation.state()[TAIL_WEIGHT], mean, atol=1e-4, rtol=1e-3)


def test_a_device_that_hides_its_sums_has_no_update_that_counts(run: Run) -> None:
    """Tried: a device avoids round 0, where its labels would be compared. Stopped by: an update
    without sums does not count."""
    files = run.federation.runs.files(run.federation.run)
    files.known(0, run.federation.participants[0]).unlink()
    run.federation.send({place: run.honest(place) for place in range(DEVICES)}, run.counts)
    assert run.refused()[1] == (run.federation.participants[0],)


def test_one_sample_under_its_id_a_thousand_times_gives_no_weight() -> None:
    """Tried: a device names the same few samples again and again. Stopped by: a bound on repeats;
    a folder in which each picture is there twice passes."""
    sender = Participant("p0001", "d", 1, 1000, 0, False, None)
    ids = [bytes([place]) * 16 for place in range(10)]
    require_own_ids(ids * 2, sender)
    for wrong in (ids * 3, ids[:1] * 1000, [bytes([n % 256, n // 256]) * 8 for n in range(1001)]):
        with pytest.raises(InvalidField) as caught:
            require_own_ids(wrong, sender)
        assert caught.value.field == "ids"
