"""References in closed form: features of several depths, ridge regression, and LDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor

from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.download import CACHE_VARIABLE, cache_dir
from edge_client.data.sources import load_dataset
from edge_client.torch_model import read
from protocol.settings import RunSettings
from sfprompt_bench.methods.closed_form import (
    evenly_spaced,
    features_at,
    fit_lda,
    fit_ridge,
    standardised,
)
from sfprompt_bench.methods.pooled import PooledModel
from sfprompt_bench.methods.registry import METHODS
from sfprompt_bench.methods.shrunk_lda import ShrunkLDA, choose_shrinkage
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone, prepare_backbone

NAMES = ("ridge-probe", "lda-probe", "ridge-depths", "lda-depths")

Samples = tuple[Tensor, Tensor]


def clusters(samples: int, width: int, seed: int = 0) -> Samples:
    """Features [N, D] of four overlapping classes with features of different scales, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(samples) % 4
    features = centres[labels] + 2 * torch.randn(samples, width, generator=generator)
    return features * torch.linspace(0.1, 10, width), labels


def settings_of(name: str, backbone: str = "vit_tiny_patch16_224") -> RunSettings:
    values = {"backbone": backbone, "weights": "random:3", "image_size": 32}
    return METHODS[name].settings(RunSettings.model_validate({"model": values}))


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return limit_per_set(load_dataset("digits", seed=0), train=40, test=12, seed=0)


@pytest.mark.parametrize(
    ("depth", "count", "numbers"),
    [
        (12, 4, (4, 7, 10, 12)),
        (24, 4, (8, 14, 19, 24)),
        (12, 1, (12,)),
        (2, 4, (1, 2)),
        (1, 4, (1,)),
    ],
)
def test_depths_are_evenly_spaced_and_end_with_the_last_block(
    depth: int, count: int, numbers: tuple[int, ...]
) -> None:
    assert evenly_spaced(depth, count) == numbers


def test_features_of_a_depth_are_those_of_timms_own_blocks(digits: Dataset) -> None:
    settings = settings_of("ridge-depths")
    model = PooledModel(settings.plan, digits)
    features, labels = features_at(model, model.test, (4, 12))
    whole = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10).eval()
    backbone = prepare_backbone(
        settings.plan.model, settings.model.weights, cache_dir() / "backbones"
    )
    whole.load_state_dict(dict(open_backbone(backbone.path)), strict=False)
    images, expected_labels = read(model.test, range(len(model.test)))
    with torch.no_grad():
        tokens = whole.forward_intermediates(
            images,
            indices=[3, 11],
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
    expected = torch.cat(
        [
            part
            for patches, prefix in tokens
            for part in (prefix[:, 0], patches.mean(1), patches.std(1, unbiased=False))
        ],
        dim=1,
    )
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("width", [6, 200])
@pytest.mark.parametrize("shrinkage", [0.01, 0.5, 1.0])
def test_discriminant_analysis_is_that_of_scikit_learn(width: int, shrinkage: float) -> None:
    features, labels = clusters(50, width)
    features, other = standardised(features, clusters(20, width, seed=1)[0])
    weights, biases = ShrunkLDA.of(features, labels).weights(shrinkage)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    reference.fit(features.numpy(), labels.numpy())
    expected = reference.decision_function(other.numpy())
    np.testing.assert_allclose((other @ weights + biases).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_class_without_samples_is_never_predicted() -> None:
    features, labels = clusters(40, 5)
    present = labels != 2
    fitted = ShrunkLDA.of(features[present].double(), labels[present])
    assert fitted.classes.tolist() == [0, 1, 3]
    assert fitted.count_correct(features[~present].double(), labels[~present], 0.1) == 0


def test_cross_validation_chooses_a_shrinkage_that_classifies_unseen_samples() -> None:
    features, labels = standardised(*2 * (clusters(60, 300)[0],))[0], clusters(60, 300)[1]
    # Without shrinkage the scores lie in directions with hardly any variance: chance.
    chosen = choose_shrinkage(features, labels, (1e-9, 0.3), folds=5)
    assert chosen == 0.3


def test_the_choice_depends_on_training_data_alone() -> None:
    train = clusters(60, 30)
    tests = [clusters(40, 30, seed=1), (torch.randn(40, 30) * 9, torch.zeros(40).long())]
    for fit in (fit_ridge, fit_lda):
        first, second = (fit(train, test)[1] for test in tests)
        assert first == second


def test_ridge_regression_has_the_penalty_with_the_least_leave_one_out_error() -> None:
    train, test = clusters(24, 40), clusters(200, 40, seed=1)
    accuracy, chosen = fit_ridge(train, test)
    features, others = (part.numpy() for part in standardised(train[0], test[0]))
    targets = torch.nn.functional.one_hot(train[1]).double().numpy()

    def error(strength: float) -> float:
        total = 0.0
        for left_out in range(len(features)):
            rest = np.arange(len(features)) != left_out
            ridge = Ridge(alpha=strength * 40).fit(features[rest], targets[rest])
            total += (
                (ridge.predict(features[left_out : left_out + 1]) - targets[left_out]) ** 2
            ).sum()
        return total

    best = chosen["strength"]
    # The intercept of RidgeClassifierCV is that of all samples: the errors differ slightly.
    assert error(best) <= 1.02 * min(error(best * factor) for factor in (0.1, 0.3, 3, 10))
    ridge = Ridge(alpha=best * 40).fit(features, targets)
    predicted = ridge.predict(others).argmax(axis=1)
    assert accuracy == pytest.approx((predicted == test[1].numpy()).mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_reports_accuracy_weights_and_what_it_chose(name: str, digits: Dataset) -> None:
    result = METHODS[name].measure(settings_of(name), digits, lambda done, total: None)  # type: ignore[attr-defined]
    deep = name.endswith("depths")
    assert 0 <= result.accuracy <= 1
    assert result.trainable_parameters == 10 * ((12 if deep else 1) * 192 + 1)
    assert result.chosen["depths"] == ([4, 7, 10, 12] if deep else [12])
    assert ("strength" if name.startswith("ridge") else "shrinkage") in result.chosen


@pytest.mark.parametrize(
    ("backbone", "summaries"),
    [("vit_base_patch16_gap_224", 2), ("beit_base_patch16_224", 3)],  # no class token; one norm
)
def test_tokens_of_other_backbones_are_summarised_behind_their_norm(
    backbone: str, summaries: int, digits: Dataset
) -> None:
    small = (("depth", 2), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8))
    plan = settings_of("ridge-depths", backbone).plan
    plan = plan.model_copy(
        update={"model": plan.model.model_copy(update={"model_overrides": small})}
    )
    model = PooledModel(plan, digits)
    features, _ = features_at(model, model.test, (1, 2))
    assert features.shape == (12, 2 * summaries * 32)
    # A layer norm leaves tokens with a mean square of 1: that of means and deviations together.
    squares = features.unflatten(1, (2, summaries, 32))[:, :, -2:].square().sum(dim=2).mean(dim=2)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-2, atol=1e-2)
