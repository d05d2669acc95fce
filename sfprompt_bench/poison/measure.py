"""Measure the accuracy of runs with hostile devices."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edge_client.data.dataset import Dataset
from protocol.federation import AggregationRule, FederationSettings
from protocol.plan import RunPlan, TrainingPlan
from protocol.seeds import derive_seed
from sfprompt_bench.methods.pooled import PooledModel
from sfprompt_bench.poison.attacks import ATTACKS, TARGET, Shard, predict, train_honestly
from sfprompt_bench.poison.federation import local_federation

_PATCH = 1 / 6  # side of the patch, as a share of the image's side


@dataclass(frozen=True)
class PoisonData:
    """Frozen features of the devices' images and of the held-out images.

    Attributes:
        shards: training data of each device.
        test: features of the held-out images, [n, F].
        patched: features of the same images with the patch of a backdoor, [n, F].
        labels: classes of the held-out images, [n].
    """

    shards: Sequence[Shard]
    test: Tensor
    patched: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PoisonResult:
    """The result of one run.

    Attributes:
        rule: aggregation rule.
        bound: whether the bound on the updates' norms was on.
        attack: name of the attack; None: all devices are honest.
        hostile: share of hostile devices.
        accuracy: accuracy of the last global state on held-out images.
        backdoor: share of patched images of other classes predicted as the target class.
        refused: refused share of the updates of hostile devices.
        refused_honest: refused share of the updates of honest devices.
    """

    rule: str
    bound: bool
    attack: str | None
    hostile: float
    accuracy: float
    backdoor: float
    refused: float
    refused_honest: float

    @property
    def label(self) -> str:
        """The name of the rule, with its bound, for people."""
        return self.rule if self.bound else f"{self.rule}, no bound"


def prepare_data(plan: RunPlan, data: Dataset, devices: int) -> PoisonData:
    """Compute all features, and distribute the training images over the devices at random."""
    model = PooledModel(plan, data)
    features, labels = model.features_of(model.train)
    patched, _ = model.features_of(model.train, _add_patch)
    test, test_labels = model.features_of(model.test)
    test_patched, _ = model.features_of(model.test, _add_patch)
    scale = features.std()
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "poison"))
    order = torch.randperm(len(labels), generator=generator)
    size = len(labels) // devices
    shards = [
        Shard(features[part] / scale, patched[part] / scale, labels[part], number)
        for number, part in enumerate(order[: size * devices].split(size))
    ]
    return PoisonData(shards, test / scale, test_patched / scale, test_labels)


def make_plan(base: RunPlan, rule: AggregationRule, *, bound: bool, rounds: int) -> RunPlan:
    """Return the plan of a run that tunes a classifier on frozen features."""
    given = {"prompt_count": 0, "prompt_at": "input", "tune": "classifier"}
    model = base.model.model_copy(update={**given, "depths": 0, "rank": 0, "keep_tokens": 0})
    federation: dict[str, object] = {"rounds": rounds, "evaluate_every": 0, "aggregation": rule}
    # The largest share of hostile devices that is measured.
    federation |= {"hostile_share": 0.4}
    if not bound:
        federation["update_norm_bound"] = None
    return RunPlan(
        name=f"poison-{rule}",
        seed=base.seed,
        model=type(base.model).model_validate(model.model_dump()),
        federation=FederationSettings.model_validate(federation),
        training=TrainingPlan(keep_fraction=1.0, local_epochs=1, split_epochs=0),
    )


def measure(plan: RunPlan, data: PoisonData, attack: str | None, share: float) -> PoisonResult:
    """Run a federation with a share of hostile devices, and measure its last state."""
    devices = len(data.shards)
    hostile = 0 if attack is None else math.ceil(share * devices - 1e-9)
    samples = len(data.shards[0].labels)
    needed = plan.federation.model_copy(update={"min_participants": devices})
    plan = plan.model_copy(update={"federation": needed})
    with (
        tempfile.TemporaryDirectory() as folder,
        local_federation(Path(folder), plan, devices, samples) as federation,
    ):
        while federation.is_open():
            state = federation.state()
            federation.send(
                [
                    ATTACKS[attack](state, shard)
                    if attack is not None and number < hostile
                    else train_honestly(state, shard)
                    for number, shard in enumerate(data.shards)
                ],
                samples,
            )
        state, views = federation.state(), federation.rounds()
        bad = set(federation.participants[:hostile])
    refused = [one for view in views for one in view.refused]
    others = data.labels != TARGET
    return PoisonResult(
        rule=plan.federation.aggregation,
        bound=plan.federation.update_norm_bound is not None,
        attack=attack,
        hostile=hostile / devices,
        accuracy=_share(predict(state, data.test) == data.labels),
        backdoor=_share(predict(state, data.patched[others]) == TARGET),
        refused=sum(one in bad for one in refused) / max(1, hostile * len(views)),
        refused_honest=sum(one not in bad for one in refused)
        / max(1, (devices - hostile) * len(views)),
    )


def measure_all(
    base: RunPlan,
    data: PoisonData,
    rules: Sequence[tuple[AggregationRule, bool]],
    attacks: Sequence[str],
    shares: Sequence[float],
    rounds: int,
) -> Iterator[PoisonResult]:
    """Yield the result of each rule without hostile devices, then with each attack and share."""
    for rule, bound in rules:
        plan = make_plan(base, rule, bound=bound, rounds=rounds)
        yield measure(plan, data, None, 0.0)
        for attack in attacks:
            for share in shares:
                if share > 0:
                    yield measure(plan, data, attack, share)


def _add_patch(images: Tensor) -> Tensor:
    """Make the lower right corner of images [B, 3, H, W] as bright as their brightest pixel."""
    side = max(1, round(_PATCH * images.shape[-1]))
    patched = images.clone()
    patched[..., -side:, -side:] = images.amax()
    return patched


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
