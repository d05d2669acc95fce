import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidField, NonFinite, WrongShape
from pruning import select_highest, selected_count

FRACTIONS = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)

# Few distinct values, so that there are ties.
SCORES = st.lists(st.integers(-3, 3).map(float), max_size=30)


@pytest.mark.parametrize(
    ("samples", "fraction", "selected"),
    [
        (0, 0.5, 0),
        (1, 0.01, 1),  # 0.01 -> 0, but at least one
        (3, 0.5, 2),  # 1.5 -> 2
        (5, 0.5, 3),  # 2.5 -> 3, not to the even 2
        (5, 0.3, 2),  # 1.5 -> 2
        (10, 0.14, 1),  # 1.4 -> 1
        (100, 0.145, 15),  # 14.5 -> 15, though the binary 0.145 * 100 is 14.499999999999998
        (3, 0.9, 3),  # 2.7 -> 3
        (10**9, 1.0, 10**9),
        (7, 1, 7),
        (4, 5e-324, 1),
    ],
)
def test_hand_calculated_counts(samples, fraction, selected):
    assert selected_count(samples, fraction) == selected


@given(st.integers(1, 10**6), FRACTIONS)
def test_the_count_is_rounded_to_the_nearest_integer(samples, fraction):
    selected = selected_count(samples, fraction)
    exact = Fraction(repr(fraction)) * samples
    assert 1 <= selected <= samples
    assert selected == 1 or abs(selected - exact) <= Fraction(1, 2)
    assert selected_count(samples, 1) == samples


@pytest.mark.parametrize("fraction", [0, -0.5, 1.0001, math.nan, math.inf])
@pytest.mark.parametrize("per_class", [False, True])
def test_a_share_out_of_range_is_refused(fraction, per_class):
    with pytest.raises(InvalidField) as caught:
        select_highest(torch.empty(0), fraction, torch.empty(0, dtype=torch.int64), per_class)
    assert caught.value.field == "keep_fraction"


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(InvalidField):
        selected_count(-1, 0.5)


def test_hand_calculated_selection():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    assert select_highest(scores, 0.5).tolist() == [1, 3]
    assert select_highest(scores, 0.25).tolist() == [1]
    assert select_highest(scores, 0.75).tolist() == [1, 2, 3]
    assert select_highest(scores, 1).tolist() == [0, 1, 2, 3]


def test_of_equal_scores_the_first_are_selected():
    assert select_highest(torch.zeros(10), 0.3).tolist() == [0, 1, 2]
    assert select_highest(torch.tensor([0.0, -0.0, 1.0, 0.0]), 0.5).tolist() == [0, 2]
    # Enough elements to detect an unstable sort.
    assert select_highest(torch.zeros(5000), 0.5).tolist() == list(range(2500))


def test_hand_calculated_selection_within_classes():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 0.2, 0.1])
    labels = torch.tensor([5, 5, 5, 5, 2, 2])
    # 2 of 4 in class 5, 1 of 2 in class 2, although both of these are below all of class 5
    assert select_highest(scores, 0.5, labels, per_class=True).tolist() == [0, 1, 4]
    assert select_highest(scores, 0.5, labels).tolist() == [0, 1, 2]


def test_no_samples_give_an_empty_selection():
    nothing = torch.empty(0, dtype=torch.int64)
    for per_class in (False, True):
        selected = select_highest(torch.empty(0), 0.5, nothing, per_class)
        assert selected.shape == (0,)
        assert selected.dtype == torch.int64


@settings(max_examples=150, deadline=None)
@given(SCORES, FRACTIONS)
def test_the_highest_scores_are_selected(values, fraction):
    scores = torch.tensor(values, dtype=torch.float32)
    selected = select_highest(scores, fraction)
    assert selected.dtype == torch.int64
    assert selected.tolist() == sorted(set(selected.tolist()))
    assert len(selected) == selected_count(len(values), fraction)
    assert torch.equal(selected, select_highest(scores, fraction))
    highest = sorted(values, reverse=True)[: len(selected)]
    assert sorted(scores[selected].tolist(), reverse=True) == highest
    # With ties at the threshold, a rejected sample has a higher index than any selected one.
    for rejected in set(range(len(values))) - set(selected.tolist()):
        key = (-values[rejected], rejected)
        assert all((-values[i], i) < key for i in selected.tolist())


@settings(max_examples=150, deadline=None)
@given(st.data(), SCORES, FRACTIONS)
def test_each_class_has_its_share(data, values, fraction):
    count = len(values)
    labels = torch.tensor(
        data.draw(st.lists(st.integers(-2, 3), min_size=count, max_size=count)), dtype=torch.int64
    )
    scores = torch.tensor(values)
    selected = select_highest(scores, fraction, labels, per_class=True)
    assert selected.tolist() == sorted(set(selected.tolist()))
    for label in set(labels.tolist()):
        of_class = (labels == label).nonzero().flatten()
        expected = select_highest(scores[of_class], fraction)
        assert selected[labels[selected] == label].tolist() == of_class[expected].tolist()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.integers(-1000, 1000), unique=True, max_size=30), FRACTIONS)
def test_the_order_of_the_samples_does_not_matter_without_ties(data, values, fraction):
    order = torch.tensor(data.draw(st.permutations(range(len(values)))), dtype=torch.int64)
    scores = torch.tensor(values, dtype=torch.float32)
    labels = torch.tensor([value % 3 for value in values], dtype=torch.int64)
    for per_class in (False, True):
        selected = select_highest(scores, fraction, labels, per_class)
        moved = select_highest(scores[order], fraction, labels[order], per_class)
        assert sorted(order[moved].tolist()) == selected.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused(bad):
    with pytest.raises(NonFinite) as caught:
        select_highest(torch.tensor([1.0, bad, bad]), 1.0)
    assert (caught.value.field, caught.value.value) == ("scores", 2)


@pytest.mark.parametrize(
    ("scores", "labels", "error", "field"),
    [
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), WrongShape, "scores"),
        (torch.tensor(1.0), torch.zeros(1, dtype=torch.int64), WrongShape, "scores"),
        (torch.zeros(2), None, InvalidField, "labels"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.int64), WrongShape, "labels"),
        (torch.zeros(2), torch.zeros(2), InvalidField, "labels"),
    ],
)
def test_inconsistent_input_is_refused(scores, labels, error, field):
    with pytest.raises(error) as caught:
        select_highest(scores, 0.5, labels, per_class=True)
    assert caught.value.field == field


@pytest.mark.parametrize("per_class", [False, True])
def test_numpy_selects_what_torch_selects_even_among_equal_scores(per_class):
    draws = np.random.default_rng(6)
    scores, labels = draws.integers(0, 5, 300).astype(np.float32), draws.integers(0, 4, 300)
    found = select_highest(scores, 0.37, labels, per_class)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.int64
    tensors = torch.from_numpy(scores), torch.from_numpy(labels)
    expected = select_highest(tensors[0], 0.37, tensors[1], per_class)
    assert found.tolist() == expected.tolist()
