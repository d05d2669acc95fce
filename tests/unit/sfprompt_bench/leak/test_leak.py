"""A server infers the labels with which a device trains from the gradients that it receives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.image_set import ImageSet
from edge_client.data.sources import load_dataset, parse_source
from protocol.errors import InvalidField
from protocol.presets import over_form
from protocol.settings import RunSettings
from sfprompt_bench.leak.attacks import cluster_directions, infer_from_sums, infer_labels, purity
from sfprompt_bench.leak.measurement import attack_round, measure_leak
from sfprompt_bench.leak.rounds import ObservedRound, observe_rounds
from sfprompt_bench.methods.pooled import PooledModel

MODEL = {
    "backbone": "vit_tiny_patch16_224",
    "weights": "random:0",
    "image_size": 32,
    "num_classes": 10,
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFPROMPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = load_dataset(parse_source("digits"), held_out=0.2, seed=0)
    return limit_per_set(data, train=120, seed=0)


def settings(gradients: str = "int4", **method: Any) -> RunSettings:
    values = over_form("default", {"model": MODEL, "wire": {"gradients": gradients}})
    values["method"] = {
        **values.get("method", {}),
        "split_epochs": 1,
        "keep_fraction": 1.0,
        **method,
    }
    return RunSettings.model_validate(values)


def first_round(data: Dataset, gradients: str) -> ObservedRound:
    """A round in which the tail is tuned too."""
    plan = settings(gradients, depths=0).plan
    return next(observe_rounds(PooledModel(plan, data), plan, rounds=1))


@pytest.mark.parametrize("gradients", ["int4", "float32"])
def test_nearly_all_labels_are_inferred(gradients: str, digits: Dataset) -> None:
    result = attack_round(first_round(digits, gradients), gradients, classes=10, seed=0)
    assert result.samples == 120
    assert result.by_least_squares > 0.9
    assert (result.by_clusters or 0) > 0.9
    # Against random labels: a tenth, and for clusters the most frequent label of some 12 samples.
    assert result.by_least_squares_random < 0.2
    assert (result.by_clusters_random or 1) < 0.45


def test_a_closed_form_start_tells_the_labels_too(digits: Dataset) -> None:
    start, first = measure_leak(settings(rank=256), digits, rounds=1)
    assert (start.round, first.round) == (0, 1)
    for result in (start, first):
        assert result.by_least_squares > 0.9
        assert result.by_least_squares_random < 0.2


def test_sums_over_more_samples_than_components_tell_less() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(50)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    shares = []
    for rank in (300, 20):
        features = torch.randn(200, rank, generator=generator)
        inferred = infer_from_sums(features, one_hot.T @ features, one_hot.sum(0))
        shares.append(float((inferred == labels).double().mean()))
    assert shares[0] == 1.0
    assert shares[1] < 0.8


def test_the_labels_come_from_the_gradients_and_not_from_the_images(digits: Dataset) -> None:
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    images, true = digits.train, digits.train.labels
    drawn = Dataset(ImageSet(images.store, true[order.numpy()], images.class_names), digits.test)
    observed = first_round(drawn, "int4")
    inferred = infer_labels(observed.tail, observed.features, observed.gradients)
    assert (inferred == observed.labels).double().mean() > 0.9


def test_only_the_label_s_component_is_negative_in_the_solution() -> None:
    """A reference by hand: a gradient made of one column of the classifier, away from it."""
    torch.manual_seed(0)
    weights = torch.randn(5, 12)
    labels = torch.arange(5).repeat(4)
    softmax = torch.rand(20, 5).softmax(dim=1)
    residuals = softmax - torch.nn.functional.one_hot(labels, 5)
    gradients = (residuals @ weights).unsqueeze(1)  # [N, 1, D]

    def tail(features: torch.Tensor) -> torch.Tensor:
        return features[:, 0] @ weights.T

    inferred = infer_labels(tail, torch.randn(20, 1, 12), gradients / 8)
    assert torch.equal(inferred, labels)


def test_directions_far_apart_are_clusters_whatever_their_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(4).repeat_interleave(10, 0)
    noise = 0.05 * torch.randn(40, 4, generator=generator)
    lengths = torch.logspace(-6, 2, 40).unsqueeze(1)
    clusters = cluster_directions(((axes + noise) * lengths).unsqueeze(1), 4, seed=0)
    labels = torch.arange(4).repeat_interleave(10)
    assert purity(clusters, labels) == 1.0


def test_purity_counts_the_most_frequent_label_of_each_cluster() -> None:
    clusters = torch.tensor([0, 0, 0, 1, 1, 2])
    labels = torch.tensor([1, 1, 0, 2, 0, 2])
    assert purity(clusters, labels) == pytest.approx(4 / 6)


def test_prompts_on_the_device_are_refused(digits: Dataset) -> None:
    plan = RunSettings.model_validate(over_form("paper", {"model": MODEL})).plan
    with pytest.raises(InvalidField, match="server must tune"):
        next(observe_rounds(PooledModel(plan, digits), plan, rounds=1))
