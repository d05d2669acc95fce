"""Figures of an evaluation, against scikit-learn's, from counts that devices report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)

from protocol.errors import InvalidField, NotFound
from protocol.messages import EvaluationReport
from protocol.quality import CONFIDENCE_BINS, EvaluationView, PredictionCounts
from split_model.predictions import PredictionCounter
from split_server.storage.events import IdempotentRequest
from tests.support.federation import FederationHarness, state_of

CLASSES = 10

SIZES = (40, 23)


def draw(seed: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Random probabilities [B, C] and labels [B]; class 9 has no image."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(CLASSES, 0.2), samples), rng.integers(0, CLASSES - 1, samples)


def counts_of(probabilities: np.ndarray, labels: np.ndarray) -> PredictionCounts:
    counter = PredictionCounter()
    for start in range(0, len(labels), 7):
        counter.add(probabilities[start : start + 7], labels[start : start + 7])
    counts = counter.counts()
    assert counts is not None
    return counts


@pytest.fixture
def harness(tmp_path: Path) -> FederationHarness:
    return FederationHarness(tmp_path)


def evaluated(harness: FederationHarness, parts: list[PredictionCounts | None]) -> EvaluationView:
    """Report each device's evaluation of round 1, and read the server's view."""
    run = harness.create(min_participants=len(parts), rounds=1)
    devices = [harness.join(run, f"device-{number}", test=100) for number in range(len(parts))]
    for device in devices:
        harness.task(run, device)
    for device in devices:
        harness.update(run, device, state_of(1.0))
    for device, counts in zip(devices, parts, strict=True):
        samples, correct = (counts.samples, counts.correct) if counts else (10, 4)
        report = EvaluationReport(
            round=1,
            attempt=0,
            samples=samples,
            correct=correct,
            loss_sum=2.0 * samples,
            predictions=counts,
        )
        once = IdempotentRequest.of(f"{run}/{device}/evaluation", device)
        harness.federation.evaluation(run, device, report, once)
    with pytest.raises(NotFound, match="closed no such round"):
        harness.reader.evaluation(run, 2)
    return harness.reader.evaluation(run, 1)


def test_figures_of_all_devices_together_are_those_of_their_pooled_images(
    harness: FederationHarness,
) -> None:
    drawn = [draw(seed, size) for seed, size in enumerate(SIZES)]
    view = evaluated(harness, [counts_of(*each) for each in drawn])
    truth = np.concatenate([labels for _, labels in drawn])
    predicted = np.concatenate([probabilities.argmax(axis=1) for probabilities, _ in drawn])
    quality = view.quality
    assert quality is not None
    assert quality.samples == sum(SIZES)
    assert quality.accuracy == pytest.approx((truth == predicted).mean())
    assert quality.majority == pytest.approx(np.bincount(truth).max() / len(truth))
    present = np.unique(truth)
    recalls = recall_score(truth, predicted, labels=present, average=None)
    assert quality.balanced_accuracy == pytest.approx(recalls.mean())
    assert quality.macro_f1 == pytest.approx(f1_score(truth, predicted, average="macro"))
    expected = confusion_matrix(truth, predicted, labels=range(CLASSES))
    matrix = np.zeros_like(expected)
    for label, column, count in view.confusion:
        matrix[label, column] = count
    np.testing.assert_array_equal(matrix, expected)
    precisions = precision_score(truth, predicted, labels=range(CLASSES), average=None)
    found = [each.precision or 0.0 for each in view.classes]
    np.testing.assert_allclose(found, precisions)
    assert view.classes[9].recall is None


def test_each_device_has_its_own_figures(harness: FederationHarness) -> None:
    drawn = [draw(seed, size) for seed, size in enumerate(SIZES)]
    view = evaluated(harness, [counts_of(*each) for each in drawn])
    assert [device.name for device in view.devices] == ["device-0", "device-1"]
    for device, (probabilities, truth) in zip(view.devices, drawn, strict=True):
        predicted = probabilities.argmax(axis=1)
        assert device.quality.accuracy == pytest.approx((truth == predicted).mean())
        keep = np.isin(predicted, truth)  # scikit-learn warns of classes without an image
        assert keep.any()
        recalls = recall_score(truth, predicted, labels=np.unique(truth), average=None)
        assert device.quality.balanced_accuracy == pytest.approx(recalls.mean())


def test_calibration_error_is_the_mean_distance_of_confidence_and_accuracy(
    harness: FederationHarness,
) -> None:
    """Worked by hand: confidences .8, .8 in one bin, half right; .5, right, in another."""
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5]])
    view = evaluated(harness, [counts_of(probabilities, np.array([0, 1, 0]))])
    assert view.quality is not None
    assert view.quality.calibration_error == pytest.approx((abs(1.6 - 1) + abs(0.5 - 1)) / 3)


def test_a_confidence_of_one_is_in_the_last_bin_and_none_is_lost() -> None:
    counts = counts_of(np.eye(CLASSES), np.arange(CLASSES))
    assert [each.samples for each in counts.bins] == [0] * (CONFIDENCE_BINS - 1) + [CLASSES]


def test_without_the_counts_of_one_device_only_accuracy_and_loss_are_known(
    harness: FederationHarness,
) -> None:
    view = evaluated(harness, [counts_of(*draw(0, 20)), None])
    assert view.quality is not None
    assert view.quality.loss == 2.0
    assert view.quality.macro_f1 is None
    assert not view.classes
    assert view.devices[0].quality.macro_f1 is not None


def test_counts_of_a_class_that_the_run_lacks_are_refused(harness: FederationHarness) -> None:
    wrong = counts_of(np.eye(CLASSES + 1), np.arange(CLASSES + 1))
    with pytest.raises(InvalidField) as caught:
        evaluated(harness, [wrong])
    error = caught.value
    assert (error.field, error.limit, error.value) == ("predictions.confusion", 9, 10)


BINS = [{"samples": 2, "correct": 1, "confidence_sum": 1.5}, *[{}] * (CONFIDENCE_BINS - 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"confusion": [[1, 0, 1], [0, 0, 1]]}, "ascending"),
        ({"confusion": [[0, 0, 1], [0, 0, 1]]}, "ascending"),
        ({"confusion": [[0, 0, 2]]}, "correct of confusion and bins differ"),
        ({"confusion": [[0, 0, 1]]}, "samples of confusion and bins differ"),
        ({"confusion": [[0, 0, 0]]}, "greater than or equal to 1"),
        ({"confusion": [[-1, 0, 1]]}, "greater than or equal to 0"),
        ({"bins": BINS[1:]}, "at least 15"),
        ({"bins": [{"samples": 1, "correct": 2}, *BINS[1:]]}, "above samples"),
        ({"bins": [{**BINS[0], "confidence_sum": 2.1}, *BINS[1:]]}, "above samples"),
    ],
)
def test_impossible_counts_are_refused(change: dict[str, object], reason: str) -> None:
    valid = {"confusion": [[0, 0, 1], [0, 1, 1]], "bins": BINS}
    assert PredictionCounts.model_validate(valid).samples == 2
    with pytest.raises(ValueError, match=reason):
        PredictionCounts.model_validate({**valid, **change})


def test_balanced_accuracy_agrees_with_scikit_learn_where_all_classes_have_images(
    harness: FederationHarness,
) -> None:
    probabilities, _ = draw(3, 50)
    truth = np.arange(50) % CLASSES
    view = evaluated(harness, [counts_of(probabilities, truth)])
    assert view.quality is not None
    expected = balanced_accuracy_score(truth, probabilities.argmax(axis=1))
    assert view.quality.balanced_accuracy == pytest.approx(expected)
