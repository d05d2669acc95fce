"""The order in which a device goes through its samples tells nothing of their classes."""

import numpy as np

from edge_client.data.dataset import by_content
from edge_client.data.sources import load_dataset


def test_the_order_depends_on_the_images_alone() -> None:
    data = load_dataset("digits")
    count = 60
    rows = np.arange(count)
    turned = rows[::-1]
    first = by_content(type(data)(data.train.subset(rows), data.test))
    second = by_content(type(data)(data.train.subset(turned), data.test))
    for position in range(count):
        assert np.array_equal(first.train.image(position), second.train.image(position))
    assert np.array_equal(first.train.labels, second.train.labels)


def test_neighbours_of_one_class_are_parted() -> None:
    data = load_dataset("digits")
    by_class = data.train.labels.argsort(kind="stable")
    sorted_set = type(data)(data.train.subset(by_class), data.test)
    labels = by_content(sorted_set).train.labels
    alike = (labels[1:] == labels[:-1]).mean()
    assert 0.05 < alike < 0.15  # ten classes: a tenth by chance
    assert np.array_equal(np.sort(labels), np.sort(data.train.labels))
