"""The natural partition: where group ids come from, and how groups are assigned to devices."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_client.data.errors import DataFormatError, PartitionError
from edge_client.data.partition import partition
from edge_client.data.sources import load_dataset
from edge_client.joining import load_run_data
from edge_client.reporter import JsonReporter
from protocol.messages import BlobRef, RunStatus, RunView
from protocol.settings import RunSettings

GROUPS = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=60)


@settings(deadline=None, max_examples=80)
@given(groups=GROUPS, seed=st.integers(0, 2**40), data=st.data())
def test_every_sample_is_in_one_part_and_no_group_is_split(
    groups: list[str], seed: int, data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(set(groups))))
    cut = partition(np.zeros(len(groups)), parts, "natural", seed, groups)
    assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(len(groups)))
    groups_by_part = [{groups[place] for place in part} for part in cut]
    assert sum(len(groups_in_part) for groups_in_part in groups_by_part) == len(set(groups))
    assert all(groups_in_part for groups_in_part in groups_by_part)
    again = partition(np.zeros(len(groups)), parts, "natural", seed, groups)
    assert all(np.array_equal(a, b) for a, b in zip(cut, again, strict=True))


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, seed=st.integers(0, 99), parts=st.integers(2, 4))
def test_parts_differ_by_the_largest_group_at_most(
    groups: list[str], seed: int, parts: int
) -> None:
    assume(parts <= len(set(groups)))
    sizes = [len(part) for part in partition(np.zeros(len(groups)), parts, "natural", seed, groups)]
    assert max(sizes) - min(sizes) <= max(groups.count(group) for group in groups)


def test_five_groups_on_two_devices_worked_out_by_hand() -> None:
    # 5 | 4; 5 | 4 + 3; 5 + 3 | 7; 8 | 7 + 1
    groups = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 3 + ["e"]
    cut = partition(np.zeros(16), 2, "natural", 0, groups)
    assert sorted(len(part) for part in cut) == [8, 8]


def test_the_seed_decides_who_gets_which_group() -> None:
    groups = [f"g{place // 3}" for place in range(60)]
    first, b = (partition(np.zeros(60), 4, "natural", seed, groups) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(first, b, strict=True))


def test_more_parts_than_groups_are_refused() -> None:
    with pytest.raises(PartitionError) as refused:
        partition(np.zeros(4), 3, "natural", 0, ["a", "a", "b", "b"])
    assert (refused.value.field, refused.value.limit) == ("parts", "1 to 2, one group each")


def write(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), shade).save(path)


NAMED = tuple(
    f"{half}/{kind}/{who}_{n}.png"
    for half, count in (("train", 3), ("test", 1))
    for kind in ("cat", "dog")
    for who in ("ann", "bob", "eve")
    for n in range(count)
)


def training_files(
    folder: Path, part: str, *, shots: int | None = None, scheme: str = "natural"
) -> list[str]:
    """List one device's training images, as the command selects them."""
    ref = BlobRef(sha256="0" * 64, nbytes=1)
    run = RunView(
        id="r",
        status=RunStatus.WAITING,
        settings=RunSettings(),
        plan=RunSettings().plan,
        round=0,
        participants=0,
        created_at=0.0,
        backbone_bytes=1,
        head=ref,
        state=ref,
    )
    dataset = load_run_data(
        f"folder:{folder}",
        run,
        part,
        scheme,
        5,
        0.2,
        None,
        None,
        shots,
        reporter=JsonReporter(),
        cache_bytes=0,
    )
    return [path.relative_to(folder).as_posix() for path in dataset.train.store.paths]


def test_the_part_of_a_name_before_the_first_underscore_is_the_group(tmp_path: Path) -> None:
    write(tmp_path, *NAMED)
    hands = [training_files(tmp_path, f"{k}/3") for k in (1, 2, 3)]
    assert [len({Path(name).name.split("_")[0] for name in hand}) for hand in hands] == [1, 1, 1]
    assert sorted(chain.from_iterable(hands)) == sorted(
        name for name in NAMED if name.startswith("train")
    )


def test_devices_of_one_seed_part_the_same_shots(tmp_path: Path) -> None:
    write(tmp_path, *NAMED)
    hands = [training_files(tmp_path, f"{k}/2", shots=4, scheme="iid") for k in (1, 2)]
    drawn = list(chain.from_iterable(hands))
    assert len(drawn) == len(set(drawn)) == 8
    assert sum("/cat/" in name for name in drawn) == 4


def table(folder: Path, text: str) -> None:
    (folder / "groups.csv").write_text(text, encoding="utf-8")


def test_a_table_of_groups_is_stronger_than_the_names(tmp_path: Path) -> None:
    write(tmp_path, "cat/a_1.png", "cat/b_2.png", "dog/a_3.png", "dog/plain.png")
    table(
        tmp_path,
        '\ufefffile,group,age\ncat/a_1.png,x,3\n./cat/b_2.png,y,4\n"dog/a_3.png",y,\n'
        "dog/plain.png, x ,1\nno/such.png,z,1\n",
    )
    store = load_dataset(f"folder:{tmp_path}", held_out=0.5).train.store
    known = {"a_1.png": "x", "b_2.png": "y", "a_3.png": "y", "plain.png": "x"}
    assert store.groups() == tuple(known[path.name] for path in store.paths)


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        ("file,group\ntrain/cat/1.png,x\n", PartitionError, "cat/2.png"),
        ("file,group\ntrain/cat/1.png,x\ntrain/cat/2.png,\n", PartitionError, "cat/2.png"),
        ("file,group\ntrain/cat/1.png,x\ntrain/cat/1.png,y\n", DataFormatError, "cat/1.png"),
        ("path,who\ntrain/cat/1.png,x\n", DataFormatError, "file,group"),
        ("", DataFormatError, "file,group"),
        ('file,group\n"train/cat/1.png,x\n', DataFormatError, "groups.csv"),
    ],
)
def test_a_table_that_is_wrong_or_lacks_an_image_is_refused(
    tmp_path: Path, text: str, error: type[Exception], named: str
) -> None:
    write(tmp_path, "train/cat/1.png", "train/cat/2.png", "test/cat/x.png")
    table(tmp_path, text)
    with pytest.raises(error, match=named):
        training_files(tmp_path, "1/1")


@pytest.mark.parametrize("name", ["1.png", "_1.png"])
def test_an_image_without_an_id_is_an_error_that_explains_ids(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"train/cat/{name}", "train/cat/ann_1.png", "test/cat/x.png")
    with pytest.raises(PartitionError) as refused:
        training_files(tmp_path, "1/1")
    assert refused.value.value == f"train/cat/{name}"
    assert "groups.csv" in str(refused.value)


def test_a_set_without_files_says_how_ids_are_given() -> None:
    with pytest.raises(PartitionError, match=r"groups\.csv"):
        load_dataset("digits").train.store.groups()


def test_names_do_not_matter_to_other_partitions(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/cat/2.png", "test/cat/x.png", "test/cat/y.png")
    table(tmp_path, "no table of groups")
    assert len(training_files(tmp_path, "1/2", scheme="iid")) == 1
