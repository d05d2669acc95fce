"""Labels that do not agree with the others', found from sums alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from split_server.closed_form.agreement import ClassMeans, Whitening
from split_server.closed_form.classifier import FeatureSums, fit_classifier
from split_server.closed_form.sums import Sums

CLASSES, RANK = 6, 20

LEAST = 0.5  # the default


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, RANK, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % CLASSES
    return centres[labels] + torch.randn(count, RANK, generator=generator), labels


def class_means(devices: Sequence[tuple[Tensor, Tensor]]) -> ClassMeans:
    features = torch.cat([each for each, _ in devices]).double()
    centred = features - features.mean(dim=0)
    moments = FeatureSums(len(features), features.mean(dim=0), centred.T @ centred)
    sums = []
    for each, labels in devices:
        one_hot = F.one_hot(labels, CLASSES).double()
        sums.append(Sums((one_hot.T @ each.double()).float(), one_hot.sum(dim=0).float()))
    return ClassMeans(Whitening.of(moments), sums)


def dealt(devices: int, each: int = 30) -> list[tuple[Tensor, Tensor]]:
    return [data(each, seed) for seed in range(devices)]


@pytest.mark.parametrize("hostile", [0, 1, 2, 4])
def test_flipped_labels_are_found_and_no_honest_ones(hostile: int) -> None:
    devices = [
        (features, CLASSES - 1 - labels if place < hostile else labels)
        for place, (features, labels) in enumerate(dealt(10))
    ]
    assert sorted(class_means(devices).find_disagreeing(LEAST)) == list(range(hostile))


def test_random_labels_are_found() -> None:
    devices = dealt(8)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    devices[2] = (devices[2][0], devices[2][1][shuffled])
    assert sorted(class_means(devices).find_disagreeing(LEAST)) == [2]


@pytest.mark.parametrize("holders", [1, 2])
def test_classes_that_too_few_others_have_are_not_compared(holders: int) -> None:
    """One class on each device, or on two, stays as exact as it was."""
    devices = []
    for label in range(CLASSES):
        features, labels = data(300)
        own = features[labels == label]
        parts = own.chunk(holders)
        devices += [(part, torch.full((len(part),), label)) for part in parts]
    means = class_means(devices)
    assert all(means.share(place) is None for place in range(len(means)))
    assert means.find_disagreeing(LEAST) == {}


def test_rare_classes_on_one_device_are_not_taken_for_frequent_ones() -> None:
    devices = dealt(6)
    features, labels = data(240, seed=50)
    rare = labels == 3
    devices.append((features[rare], labels[rare]))
    assert class_means(devices).find_disagreeing(LEAST) == {}


def test_nobody_is_left_out_where_as_many_disagree_as_agree() -> None:
    devices = [
        (features, CLASSES - 1 - labels if place < 2 else labels)
        for place, (features, labels) in enumerate(dealt(4))
    ]
    assert class_means(devices).find_disagreeing(LEAST) == {}
    assert class_means(devices[1:3]).find_disagreeing(LEAST) == {}


def test_a_later_participant_is_compared_through_the_classifiers_own_map() -> None:
    devices = dealt(5)
    features = torch.cat([each for each, _ in devices]).double()
    labels = torch.cat([each for _, each in devices])
    centred = features - features.mean(dim=0)
    moments = FeatureSums(len(features), features.mean(dim=0), centred.T @ centred)
    one_hot = F.one_hot(labels, CLASSES).double()
    fit = fit_classifier(
        moments, one_hot.T @ features, one_hot.sum(dim=0), torch.ones(RANK, dtype=torch.float64)
    )
    for flips in (False, True):
        own, named = data(40, seed=77)
        named = CLASSES - 1 - named if flips else named
        whitening = Whitening.of_solved(fit, own)
        hot = F.one_hot(named, CLASSES).double()
        later = Sums((hot.T @ own.double()).float(), hot.sum(dim=0).float())
        others = []
        for each, theirs in devices:
            hot = F.one_hot(theirs, CLASSES).double()
            others.append(Sums((hot.T @ each.double()).float(), hot.sum(dim=0).float()))
        share = ClassMeans(whitening, [later, *others]).share(0)
        assert share is not None
        assert (share[0] < LEAST) is flips
