"""Randomised response: how often labels change, and what the noised ones depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.data.label_noise import replacement_rate, with_noised_labels

SECRET = bytes(range(32))

CLASSES = ("a", "b", "c", "d")


def image_set(labels: np.ndarray, seed: int = 0) -> ImageSet:
    shape = (len(labels), 1, 4, 4)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return ImageSet(ArrayStore(pixels), labels, CLASSES)


def dataset(labels: np.ndarray) -> Dataset:
    return Dataset(image_set(labels), image_set(np.array([0, 1]), seed=1))


def noised(labels: np.ndarray, epsilon: float, secret: bytes = SECRET) -> np.ndarray:
    return with_noised_labels(dataset(labels), epsilon, secret).train.labels


@given(st.floats(1e-3, 100), st.integers(2, 1000))
def test_a_label_is_at_most_e_to_the_epsilon_likelier_than_another(
    epsilon: float, classes: int
) -> None:
    rate = replacement_rate(epsilon, classes)
    unchanged, other = 1 - rate + rate / classes, rate / classes
    assert 0 < rate <= 1
    assert math.log(unchanged / other) <= epsilon * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_labels_change_as_often_as_randomised_response_says(epsilon: float) -> None:
    labels = np.zeros(20_000, np.int64)
    shares = np.bincount(noised(labels, epsilon), minlength=4) / len(labels)
    total = math.exp(epsilon) + 3
    assert shares[0].item() == pytest.approx(math.exp(epsilon) / total, abs=0.015)
    for share in shares[1:].tolist():
        assert share == pytest.approx(1 / total, abs=0.01)


def test_a_replaced_label_depends_on_the_image_alone() -> None:
    labels = np.tile(np.arange(4), 500)
    other = (labels + 1) % 4
    first, second = noised(labels, 1.0), noised(other, 1.0)
    equal = first == second
    # The others are those that were left as they are.
    assert np.array_equal(first[~equal], labels[~equal])
    assert np.array_equal(second[~equal], other[~equal])
    assert 0.5 < equal.mean() < 0.75  # replaced: 4 / (e + 3)


def test_an_image_keeps_its_noised_label_wherever_it_stands() -> None:
    labels = np.tile(np.arange(4), 50)
    data = dataset(labels)
    order = np.random.default_rng(3).permutation(200)
    moved = Dataset(data.train.subset(order), data.test)
    again = with_noised_labels(moved, 1.0, SECRET).train.labels
    assert np.array_equal(again, noised(labels, 1.0)[order])


def test_another_secret_and_another_epsilon_draw_anew() -> None:
    labels = np.zeros(1000, np.int64)
    base = noised(labels, 1.0)
    for other in (noised(labels, 1.0, bytes(32)), noised(labels, 1.0 + 1e-9)):
        assert 0.2 < (other != base).mean() < 0.8


def test_test_labels_and_the_devices_own_data_stay() -> None:
    data = dataset(np.tile(np.arange(4), 50))
    result = with_noised_labels(data, 0.1, SECRET)
    assert np.array_equal(result.test.labels, data.test.labels)
    assert np.array_equal(data.train.labels, np.tile(np.arange(4), 50))
