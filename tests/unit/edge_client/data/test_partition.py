"""Parting a set among participants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data.errors import PartitionError
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.data.partition import Part, Scheme, parse_scheme, partition

SCHEMES = st.one_of(
    st.just("iid"),
    st.floats(0.001, 1000).map(lambda alpha: f"dirichlet:{alpha}"),
    st.floats(0.001, 1000).map(lambda alpha: f"quantity:{alpha}"),
    st.integers(1, 5).map(lambda count: f"shards:{count}"),
)

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80)


@settings(deadline=None, max_examples=80)
@given(labels=LABELS, scheme=SCHEMES, seed=st.integers(-3, 2**70), data=st.data())
def test_every_sample_is_in_exactly_one_part_and_no_part_is_empty(
    labels: list[int], scheme: str, seed: int, data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(labels)))
    cut = partition(labels, parts, scheme, seed)
    assert len(cut) == parts
    assert all(len(part) and part.dtype == np.int64 for part in cut)
    assert all(np.array_equal(part, np.sort(part)) for part in cut)
    assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(len(labels)))
    again = partition(labels, parts, scheme, seed)
    assert all(np.array_equal(a, b) for a, b in zip(cut, again, strict=True))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.3", "shards:2", "quantity:0.5"])
def test_the_seed_and_nothing_else_fixes_the_parts(scheme: str) -> None:
    labels = np.arange(200) % 10
    state = np.random.get_state()[1].copy()
    first = partition(labels, 4, scheme, 1)
    b = partition(labels, 4, scheme, 2)
    assert any(not np.array_equal(a, b) for a, b in zip(first, b, strict=True))
    assert np.array_equal(state, np.random.get_state()[1])


def test_iid_parts_differ_by_one_sample_at_most() -> None:
    sizes = [len(part) for part in partition(np.zeros(103), 4, "iid", 0)]
    assert max(sizes) - min(sizes) <= 1


def test_a_smaller_alpha_skews_the_classes_more() -> None:
    labels = np.arange(1000) % 10

    def skew(alpha: float) -> float:
        counts = np.array(
            [
                np.bincount(labels[part], minlength=10)
                for part in partition(labels, 5, f"dirichlet:{alpha}", 0)
            ]
        )
        return float(counts.std(axis=0).mean())

    assert skew(0.1) > 2 * skew(1.0) > 2 * skew(100.0)


def test_shards_bound_the_classes_of_a_part() -> None:
    labels = np.arange(1000) % 10
    for part in partition(labels, 10, "shards:2", 0):
        assert len(part) == 100
        assert len(np.unique(labels[part])) <= 3


def test_quantity_skews_sizes_and_not_classes() -> None:
    labels = np.arange(2000) % 2
    cut = partition(labels, 4, "quantity:0.5", 3)
    sizes = sorted(len(part) for part in cut)
    assert sizes[-1] > 2 * sizes[0]
    assert abs(labels[max(cut, key=len)].mean() - 0.5) < 0.1


def test_more_parts_than_samples_are_refused() -> None:
    with pytest.raises(PartitionError) as refused:
        partition([0, 1], 3, "iid", 0)
    assert refused.value.field == "parts"
    assert refused.value.value == 3


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("iid", Scheme("iid")),
        ("dirichlet:0.3", Scheme("dirichlet", 0.3)),
        ("shards:2", Scheme("shards", 2)),
        ("quantity:0.5", Scheme("quantity", 0.5)),
        ("natural", Scheme("natural")),
    ],
)
def test_a_scheme_is_read_and_written_back(text: str, scheme: Scheme) -> None:
    assert parse_scheme(text) == scheme
    assert str(scheme) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "iid:1",
        "dirichlet",
        "dirichlet:0",
        "dirichlet:nan",
        "shards:1.5",
        "shards:0",
        "x:1",
        "natural:2",
    ],
)
def test_an_unreadable_scheme_is_refused(text: str) -> None:
    with pytest.raises(PartitionError):
        parse_scheme(text)


def test_a_part_is_counted_from_one() -> None:
    pixels = np.arange(40).astype(np.uint8).reshape(-1, 1, 1, 1)
    labels = np.arange(40) % 4
    images = ImageSet(ArrayStore(pixels), labels, ("a", "b", "c", "d"))
    taken = [Part.parse(f"{k}/4").take(images, "iid", 7) for k in (1, 2, 3, 4)]
    assert all(
        part.store.pixels.flatten().tolist() == cut.tolist()
        for part, cut in zip(taken, partition(labels, 4, "iid", 7), strict=True)
    )
    assert str(Part.parse("2/4")) == "2/4"


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/4/2", "²/4"])
def test_an_unreadable_part_is_refused(text: str) -> None:
    with pytest.raises(PartitionError):
        Part.parse(text)
