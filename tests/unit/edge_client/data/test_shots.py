"""So many training images of each class, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.errors import PartitionError
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.data.sources import load_dataset
from protocol.errors import InvalidField
from protocol.messages import parse_message
from sfprompt_bench.compare.config import Comparison
from sfprompt_bench.compare.plan import plan


def dataset_of(labels: list[int], classes: int) -> Dataset:
    """Make images whose pixels are their position."""
    pixels = np.arange(len(labels)).astype(np.uint8).reshape(-1, 1, 1, 1)
    names = tuple(f"c{number}" for number in range(classes))
    images = ImageSet(ArrayStore(pixels), np.array(labels), names)
    return Dataset(images, images)


def positions_in(images: ImageSet) -> list[int]:
    return [int(images.image(i)[0, 0, 0]) for i in range(len(images))]


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(3, 9), min_size=1, max_size=6),
    shots=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_every_class_has_just_so_many_and_a_seed_fixes_which(
    counts: list[int], shots: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    data = dataset_of(labels.tolist(), len(counts))
    few, again = (limit_per_set(data, shots=shots, seed=seed) for _ in range(2))
    assert few.train.class_counts().tolist() == [shots] * len(counts)
    assert len(set(positions_in(few.train))) == shots * len(counts)
    assert positions_in(few.train) == positions_in(again.train)
    assert few.test is data.test


def test_another_seed_draws_others_and_the_test_set_has_a_limit_of_its_own() -> None:
    data = load_dataset("digits")
    first, other = (limit_per_set(data, shots=4, test=30, seed=seed) for seed in (1, 2))
    assert (len(first.train), len(first.test)) == (40, 30)
    assert not np.array_equal(first.train.store.pixels, other.train.store.pixels)


def test_a_class_with_too_few_is_named_with_its_count() -> None:
    with pytest.raises(PartitionError) as refused:
        limit_per_set(dataset_of([0, 0, 0, 1, 1], 2), shots=3, seed=0)
    assert refused.value.field == "training images of class c1"
    assert (refused.value.limit, refused.value.value) == ("at least 3", 2)
    with pytest.raises(PartitionError, match="class c2"):  # a class of the run without any image
        limit_per_set(dataset_of([0, 1], 3), shots=1, seed=0)


@pytest.mark.parametrize("more", [{"shots": 0}, {"shots": 2, "train": 5}])
def test_no_shots_and_two_limits_are_refused(more: dict[str, int]) -> None:
    with pytest.raises(PartitionError):
        limit_per_set(dataset_of([0, 0, 1, 1], 2), seed=0, **more)


TINY = {"backbone": "vit_tiny_patch16_224", "weights": "random:3", "image_size": 32}


def comparison(**more: object) -> Comparison:
    return parse_message(Comparison, {"data": "digits", "model": TINY, **more})


def test_shots_can_be_swept_and_make_other_tasks_of_references_too(tmp_path: Path) -> None:
    settings = comparison(methods=("sfprompt", "linear-probe"), sweep={"shots": (1, 4)})
    jobs = plan(settings, tmp_path)
    assert [job.task.inputs["shots"] for job in jobs] == [1, 1, 4, 4]
    assert len({job.task.key for job in jobs}) == 4


def test_a_comparison_has_one_limit_for_training() -> None:
    with pytest.raises(InvalidField, match="limit_train"):
        comparison(shots=2, limit_train=100)
    swept = comparison(limit_train=100, sweep={"shots": (2,)})
    with pytest.raises(InvalidField, match="limit_train"):
        swept.at({"shots": 2})
