import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pruning
from protocol.errors import InvalidField, WrongShape
from protocol.plan import TrainingPlan
from pruning import SCORES, el2n, grand, loss, margin, random

# softmax of (log 1, log 2, log 5) is (1/8, 2/8, 5/8).
LOGITS = torch.tensor([[0.0, math.log(2), math.log(5)]] * 3)

LABELS = torch.tensor([0, 1, 2])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def compute_scores(logits, labels, features=None):
    features = torch.ones(len(labels), 4) if features is None else features
    return {name: score(logits, labels, features, seeded()) for name, score in SCORES.items()}


def test_el2n_by_hand():
    # class 0: (1/8 - 1, 2/8, 5/8) = (-7, 2, 5)/8, norm sqrt(49 + 4 + 25)/8 = sqrt(78)/8
    # class 1: (1/8, 2/8 - 1, 5/8) = (1, -6, 5)/8, norm sqrt(1 + 36 + 25)/8 = sqrt(62)/8
    # class 2: (1/8, 2/8, 5/8 - 1) = (1, 2, -3)/8, norm sqrt(1 + 4 + 9)/8 = sqrt(14)/8
    expected = torch.tensor([78.0, 62.0, 14.0]).sqrt() / 8
    torch.testing.assert_close(el2n(LOGITS, LABELS), expected)


def test_grand_by_hand():
    # The features (2, 2) have norm sqrt(8); with the bias' 1 the factor is sqrt(8 + 1) = 3.
    features = torch.full((3, 2), 2.0)
    expected = 3 * torch.tensor([78.0, 62.0, 14.0]).sqrt() / 8
    torch.testing.assert_close(grand(LOGITS, LABELS, features), expected)


def test_margin_by_hand():
    # class 0: log 5 - log 1; class 1: log 5 - log 2; class 2: log 2 - log 5 (correct, so negative)
    expected = torch.tensor([math.log(5), math.log(5 / 2), math.log(2 / 5)])
    torch.testing.assert_close(margin(LOGITS, LABELS), expected)


def test_loss_by_hand():
    # -log of 1/8, 2/8 and 5/8
    expected = torch.tensor([math.log(8), math.log(4), math.log(8 / 5)])
    torch.testing.assert_close(loss(LOGITS, LABELS), expected)


def test_random_uses_the_generator():
    expected = torch.rand(3, generator=seeded(5))
    assert torch.equal(random(LOGITS, LABELS, generator=seeded(5)), expected)
    assert not torch.equal(random(LOGITS, LABELS, generator=seeded(6)), expected)


@pytest.mark.parametrize("samples", [1, 7])
def test_grand_is_the_norm_of_the_classifiers_gradient(samples):
    generator = seeded(samples)
    classifier = torch.nn.Linear(5, 4)
    features = torch.randn(samples, 5, generator=generator)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    norms = []
    for feature, label in zip(features, labels, strict=True):
        classifier.zero_grad()
        F.cross_entropy(classifier(feature), label).backward()
        gradients = [classifier.weight.grad.flatten(), classifier.bias.grad]
        norms.append(torch.cat(gradients).norm())
    scores = grand(classifier(features), labels, features)
    torch.testing.assert_close(scores, torch.stack(norms))
    assert not scores.requires_grad


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(2, 6), st.integers(0, 2**32))
def test_scores_are_finite_and_follow_their_samples(samples, classes, seed):
    generator = seeded(seed)
    logits = 10 * torch.randn(samples, classes, generator=generator)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    features = torch.randn(samples, 3, generator=generator)
    order = torch.randperm(samples, generator=generator)
    scores = compute_scores(logits, labels, features)
    moved = compute_scores(logits[order], labels[order], features[order])
    for name, score in scores.items():
        assert score.shape == (samples,)
        assert bool(score.isfinite().all())
        if name != "random":
            torch.testing.assert_close(moved[name], score[order])
    assert bool((scores["el2n"] >= 0).all())
    assert bool((scores["el2n"] <= math.sqrt(2) + 1e-6).all())
    # The margin of a misclassified sample is positive.
    wrong = logits.argmax(dim=1) != labels
    assert torch.equal(scores["margin"] > 0, wrong)


@pytest.mark.parametrize("name", ["el2n", "grand", "margin", "loss"])
def test_a_larger_error_gives_a_higher_score(name):
    logits = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    score = compute_scores(logits, torch.zeros(4, dtype=torch.int64))[name]
    assert score.tolist() == sorted(score.tolist())
    assert len(set(score.tolist())) == 4


@pytest.mark.parametrize("name", ["el2n", "grand", "margin"])
def test_very_confident_samples_still_have_an_order(name):
    # 1 - softmax would be 0 in float32 for both: exp(-25) and exp(-30) are lost in a sum with 1.
    logits = torch.tensor([[30.0, 0.0], [25.0, 0.0]])
    score = compute_scores(logits, torch.tensor([0, 0]))[name]
    assert score[1] > score[0]


def test_extreme_logits_do_not_overflow():
    logits = torch.tensor([[1e30, -1e30], [-1e30, 1e30]])
    for name, score in compute_scores(logits, torch.tensor([0, 0])).items():
        assert bool(score.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(5, 3, generator=seeded()).to(dtype)
    labels = torch.tensor([0, 1, 2, 0, 1])
    for name, score in compute_scores(logits, labels).items():
        assert score.dtype == torch.float32, name
        torch.testing.assert_close(score, compute_scores(logits.float(), labels)[name])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_can_have_any_integer_dtype(dtype):
    for name, score in compute_scores(LOGITS, LABELS.to(dtype)).items():
        assert torch.equal(score, compute_scores(LOGITS, LABELS)[name]), name


@pytest.mark.parametrize("name", ["el2n", "grand", "margin", "loss"])
@pytest.mark.parametrize("label", [0, 1])
def test_a_nan_logit_gives_a_non_finite_score(name, label):
    logits = torch.tensor([[math.nan, 0.0]])
    assert not compute_scores(logits, torch.tensor([label]))[name].isfinite()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "field"),
    [
        (torch.zeros(3), LABELS, WrongShape, "logits"),
        (torch.zeros(3, 0), LABELS, WrongShape, "logits"),
        (torch.zeros(3, 3, dtype=torch.int64), LABELS, InvalidField, "logits"),
        (LOGITS, LABELS[:2], WrongShape, "labels"),
        (LOGITS, LABELS[:, None], WrongShape, "labels"),
        (LOGITS, LABELS.float(), InvalidField, "labels"),
        (LOGITS, LABELS > 1, InvalidField, "labels"),
        (LOGITS, torch.tensor([0, 1, 3]), InvalidField, "labels"),
        (LOGITS, torch.tensor([0, -1, 2]), InvalidField, "labels"),
    ],
)
def test_inconsistent_input_is_refused(name, logits, labels, error, field):
    with pytest.raises(error) as caught:
        SCORES[name](logits, labels, torch.ones(3, 4), seeded())
    assert caught.value.field == field


def test_missing_arguments_are_refused():
    with pytest.raises(InvalidField, match="features"):
        grand(LOGITS, LABELS)
    with pytest.raises(WrongShape, match="features"):
        grand(LOGITS, LABELS, torch.ones(2, 4))
    with pytest.raises(InvalidField, match="generator"):
        random(LOGITS, LABELS)
    with pytest.raises(WrongShape, match="two classes"):
        margin(torch.zeros(1, 1), torch.tensor([0]))


def test_the_registry_matches_the_plan():
    allowed = TrainingPlan.model_json_schema()["properties"]["pruning"]["enum"]
    assert sorted(SCORES) == sorted(allowed)


def test_the_exported_names():
    names = "SCORES Score draw_random_scores el2n grand loss margin random"
    names += " select_highest selected_count"
    assert sorted(pruning.__all__) == sorted(names.split())
    assert all(hasattr(pruning, name) for name in pruning.__all__)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_gives_torchs_scores(name, dtype):
    draws = np.random.default_rng(3)
    logits = (draws.standard_normal((200, 7)) * 8).astype(dtype)
    labels, features = draws.integers(0, 7, 200), draws.standard_normal((200, 5)).astype(dtype)
    found = SCORES[name](logits, labels, features, np.random.default_rng(4))
    assert isinstance(found, np.ndarray)
    tensors = [torch.from_numpy(array) for array in (logits, labels, features)]
    expected = SCORES[name](*tensors, np.random.default_rng(4))
    # The loss of a confident sample is a difference of numbers near 1.
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=2.5e-7)
    assert found.dtype == expected.numpy().dtype


def test_numpys_loss_is_torchs_cross_entropy():
    draws = np.random.default_rng(5)
    logits, labels = draws.standard_normal((50, 4)) * 30, draws.integers(0, 4, 50)
    expected = F.cross_entropy(*map(torch.from_numpy, (logits, labels)), reduction="none")
    np.testing.assert_allclose(loss(logits, labels), expected.numpy(), rtol=1e-12, atol=1e-13)
