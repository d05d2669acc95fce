"""Leave-one-out scores, the scale of the classifier, and how much of the penalty stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from split_model.linear_fit import calibrate, caution, leave_one_out


def test_leave_one_out_scores_are_those_of_fits_without_the_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 5, generator=generator).double()
    one_hot = F.one_hot(torch.arange(30) % 3, 3).double()
    fit = Ridge(alpha=2.0).fit(features.numpy(), one_hot.numpy())
    centred = features - features.mean(dim=0)
    inverse = torch.linalg.inv(centred.T @ centred + 2.0 * torch.eye(5).double())
    leverage = 1 / 30 + (centred @ inverse * centred).sum(dim=1)
    scores = fit.predict(features.numpy())
    found = leave_one_out(scores, one_hot.numpy(), leverage.numpy())
    for left in (0, 11, 29):
        rest = [place for place in range(30) if place != left]
        without = Ridge(alpha=2.0).fit(features[rest].numpy(), one_hot[rest].numpy())
        expected = without.predict(features[left : left + 1].numpy())[0]
        np.testing.assert_allclose(found[left], expected, atol=0.02, rtol=0.02)


def test_the_factor_of_scores_has_the_smallest_loss() -> None:
    scores = torch.tensor([[0.3, 0.1], [0.2, 0.25], [0.1, 0.4], [0.4, 0.38]])
    labels = torch.tensor([0, 0, 1, 1])
    factor, loss = calibrate(scores.numpy(), labels.numpy())
    assert loss == pytest.approx(F.cross_entropy(factor * scores.double(), labels).item())
    for other in (1.0, 0.8 * factor, 1.25 * factor):
        assert loss <= F.cross_entropy(other * scores, labels).item() + 1e-6


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.1), (0.2, 0.1), (0.35, 0.5), (0.5, 1.0), (2.0, 1.0)]
)
def test_more_of_the_penalty_stays_the_nearer_the_loss_is_to_guessing(
    share: float, expected: float
) -> None:
    for classes in (2, 10, 1000):
        assert caution(share * math.log(classes), classes) == pytest.approx(expected)
