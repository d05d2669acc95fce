"""The classifier equals scikit-learn's ridge regression on the pooled samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from split_server.closed_form.classifier import FeatureSums, RidgeClassifier, fit_classifier

SAMPLES, RANK, CLASSES = 80, 12, 4


def features_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % CLASSES
    centres = torch.randn(CLASSES, RANK, generator=generator)
    return centres[labels] + torch.randn(SAMPLES, RANK, generator=generator), labels


def sums_of(features: Tensor) -> FeatureSums:
    exact = features.double()
    centred = exact - exact.mean(dim=0)
    return FeatureSums(len(features), exact.mean(dim=0), centred.T @ centred)


def fit(features: Tensor, labels: Tensor, scale: Tensor | None = None) -> RidgeClassifier:
    one_hot = F.one_hot(labels, CLASSES).double()
    scale = torch.ones(features.shape[1], dtype=torch.float64) if scale is None else scale
    class_sums = one_hot.T @ features.double()
    return fit_classifier(sums_of(features), class_sums, one_hot.sum(dim=0), scale)


def strength_of(classifier: RidgeClassifier, features: Tensor) -> float:
    """The ridge's strength, from A A' = (products + strength)^-1."""
    inverse = classifier.influence @ classifier.influence.T
    return float((torch.linalg.inv(inverse) - sums_of(features).products).diagonal().mean())


def test_weights_are_those_of_scikit_learns_ridge() -> None:
    features, labels = features_and_labels()
    classifier = fit(features, labels)
    reference = Ridge(alpha=strength_of(classifier, features)).fit(
        features.double().numpy(), F.one_hot(labels, CLASSES).double().numpy()
    )
    np.testing.assert_allclose(classifier.weight, reference.coef_, atol=1e-5)
    np.testing.assert_allclose(classifier.bias, reference.intercept_, atol=1e-5)


def test_the_strength_has_the_smallest_leave_one_out_error_of_its_neighbours() -> None:
    features, labels = features_and_labels()
    one_hot = F.one_hot(labels, CLASSES).double().numpy()
    exact = features.double().numpy()

    def error(strength: float) -> float:
        held_out = [
            Ridge(alpha=strength)
            .fit(np.delete(exact, i, 0), np.delete(one_hot, i, 0))
            .predict(exact[i : i + 1])[0]
            for i in range(SAMPLES)
        ]
        return float(((np.array(held_out) - one_hot) ** 2).sum())

    chosen = strength_of(fit(features, labels), features)
    assert error(chosen) < min(error(chosen / 30), error(chosen * 30))


def test_leverage_gives_the_scores_of_fits_without_the_sample() -> None:
    features, labels = features_and_labels()
    classifier = fit(features, labels)
    one_hot = F.one_hot(labels, CLASSES).float()
    scores = features @ classifier.weight.T + classifier.bias
    leverage = classifier.leverage(features).float().unsqueeze(1)
    left_out = (scores - leverage * one_hot) / (1 - leverage)
    strength = strength_of(classifier, features)
    for i in (0, 17, 79):
        rest = torch.arange(SAMPLES) != i
        reference = Ridge(alpha=strength).fit(features[rest].numpy(), one_hot[rest].numpy())
        np.testing.assert_allclose(
            left_out[i], reference.predict(features[i : i + 1].numpy())[0], atol=1e-3
        )


def test_the_scale_of_the_components_does_not_change_the_scores() -> None:
    features, labels = features_and_labels()
    scale = torch.logspace(-2, 2, RANK, dtype=torch.float64)
    plain, scaled = fit(features, labels), fit(features * scale.float(), labels, scale)
    torch.testing.assert_close(
        features @ plain.weight.T + plain.bias,
        (features * scale.float()) @ scaled.weight.T + scaled.bias,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("samples", [3, 12])
def test_fewer_samples_than_components_give_finite_weights(samples: int) -> None:
    features, labels = features_and_labels()
    classifier = fit(features[:samples], labels[:samples])
    assert bool(torch.isfinite(classifier.weight).all())


def test_an_unused_component_and_a_class_without_samples_get_no_weight() -> None:
    features, labels = features_and_labels()
    features[:, 3] = 0
    scale = torch.ones(RANK, dtype=torch.float64)
    scale[3] = 0
    classifier = fit(features, labels.clamp(max=CLASSES - 2), scale)
    assert torch.count_nonzero(classifier.weight[:, 3]) == 0
    assert torch.count_nonzero(classifier.weight[CLASSES - 1]) == 0


def test_samples_of_their_own_features_are_not_learnt_by_heart() -> None:
    """Any strength fits them equally well; without one, leave-one-out scores are the labels."""
    features = torch.eye(40, dtype=torch.float64)
    one_hot = F.one_hot(torch.arange(4).repeat(10), 4).double()
    centred = features - features.mean(dim=0)
    sums = FeatureSums(40, features.mean(dim=0), centred.T @ centred)
    scale = torch.ones(40, dtype=torch.float64)
    fit = fit_classifier(sums, one_hot.T @ features, one_hot.sum(dim=0), scale)
    assert fit.leverage(features).mean() < 0.98
