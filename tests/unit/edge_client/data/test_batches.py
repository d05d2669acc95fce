"""Images to batches of floats: resizing, the cache, the order, the augmentation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.data.batches import Augmentation, BatchReader, Preprocessing, shuffled
from edge_client.data.errors import CorruptImageError, PreprocessingError
from edge_client.data.image_set import ArrayStore, FileStore, ImageSet
from edge_client.data.sources import load_dataset

MEAN = (0.5, 0.4, 0.3)

STD = (0.2, 0.3, 0.4)

WAY = Preprocessing(8, MEAN, STD)


@pytest.fixture
def mixed(tmp_path: Path) -> ImageSet:
    """Six image files of three sizes, each of random pixels."""
    paths = []
    for i, size in enumerate([(8, 8), (8, 8), (20, 12), (12, 20), (5, 5), (8, 8)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return ImageSet(FileStore(paths, tmp_path), np.arange(6) % 2, ("a", "b"))


def read(images: ImageSet, positions: Sequence[int], preprocessing: Preprocessing) -> np.ndarray:
    return BatchReader(images, preprocessing).read(positions)[0]


def test_values_are_scaled_and_normalised() -> None:
    pixels = np.zeros((2, 3, 8, 8), np.uint8)
    pixels[1] = 255
    images = ImageSet(ArrayStore(pixels), np.array([0, 1]), ("a", "b"))
    batch = read(images, [0, 1], Preprocessing(4, MEAN, STD))
    assert batch.shape == (2, 3, 4, 4)
    assert batch.dtype == np.float32
    for channel in range(3):
        low = -MEAN[channel] / STD[channel]
        high = (1 - MEAN[channel]) / STD[channel]
        assert np.allclose(batch[0, channel], low)
        assert np.allclose(batch[1, channel], high)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_an_image_alone_and_among_others_is_the_same(mixed: ImageSet, interpolation) -> None:
    order, preprocessing = [5, 0, 1, 2, 3, 4, 1], Preprocessing(7, MEAN, STD, interpolation)
    together = read(mixed, order, preprocessing)
    alone = np.concatenate([read(mixed, [i], preprocessing) for i in order])
    assert np.array_equal(together, alone)


def test_the_middle_of_a_long_image_is_kept() -> None:
    pixels = np.zeros((3, 4, 12), np.uint8)
    pixels[..., 4:8] = 255
    assert (WAY.resize(pixels) == 255).all()


def test_shrinking_averages_rather_than_skips() -> None:
    stripes = np.zeros((3, 64, 64), np.uint8)
    stripes[..., ::2] = 200
    small = Preprocessing(8, MEAN, STD, "bilinear").resize(stripes)
    assert (np.abs(small.astype(int) - 100) <= 4).all()


def test_no_index_gives_an_empty_batch(mixed: ImageSet) -> None:
    assert read(mixed, [], WAY).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("images_kept", [0, 2, 6, 100])
def test_the_cache_changes_nothing_but_the_reading(
    mixed: ImageSet, images_kept: int, tmp_path: Path
) -> None:
    plain = BatchReader(mixed, WAY)
    cached = BatchReader(mixed, WAY, cache_bytes=images_kept * WAY.bytes_per_image)
    for batch in ([4, 0, 1], [5, 5, 2], [3], [0, 1, 2, 3, 4, 5]):
        expected, labels = plain.read(batch)
        images, same_labels = cached.read(np.array(batch))
        assert np.array_equal(images, expected)
        assert np.array_equal(labels, same_labels)
    assert len(cached) == 6
    for path in tmp_path.glob("*.png"):
        path.unlink()
    cached_count = min(images_kept, 6)
    assert cached.read(range(cached_count))[0].shape == (cached_count, 3, 8, 8)
    for position in range(cached_count, 6):
        with pytest.raises(CorruptImageError):
            cached.read([position])


def test_a_cached_image_is_not_read_again(mixed: ImageSet, tmp_path: Path) -> None:
    reader = BatchReader(mixed, WAY, cache_bytes=10**6)
    before, _ = reader.read(range(6))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert np.array_equal(reader.read(range(6))[0], before)


def test_batches_hold_every_index_once_in_an_order_fixed_by_seed_and_epoch() -> None:
    first = shuffled(10, 4, seed=1)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(np.concatenate(first).tolist()) == list(range(10))
    assert np.array_equal(np.concatenate(first), np.concatenate(shuffled(10, 4, seed=1)))
    assert not np.array_equal(np.concatenate(first), np.concatenate(shuffled(10, 4, seed=2)))
    assert not np.array_equal(
        np.concatenate(first), np.concatenate(shuffled(10, 4, seed=1, epoch=1))
    )
    assert shuffled(0, 4, seed=1) == []


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    shuffled(10, 4, seed=1)
    load_dataset("digits", seed=4)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(("n", "batch_size", "epoch"), [(-1, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_senseless_batches_are_refused(n: int, batch_size: int, epoch: int) -> None:
    with pytest.raises(PreprocessingError):
        shuffled(n, batch_size, seed=0, epoch=epoch)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("image_size", {"image_size": 0}),
        ("image_size", {"image_size": 10**6}),
        ("mean", {"mean": (0.0, float("nan"), 0.0)}),
        ("std", {"std": (0.0, 1.0, 1.0)}),
        ("std", {"std": (1.0, 1.0)}),
        ("interpolation", {"interpolation": "lanczos"}),
    ],
)
def test_senseless_preprocessing_is_refused_by_name(field: str, change: dict) -> None:
    with pytest.raises(PreprocessingError) as refused:
        Preprocessing(**({"image_size": 8, "mean": MEAN, "std": STD} | change))
    assert refused.value.field == field


def test_a_negative_cache_or_a_wild_shift_is_refused(mixed: ImageSet) -> None:
    with pytest.raises(PreprocessingError):
        BatchReader(mixed, WAY, cache_bytes=-1)
    with pytest.raises(PreprocessingError):
        Augmentation(seed=0, max_shift=0.6)


def test_augmentation_is_off_unless_an_epoch_is_named(mixed: ImageSet) -> None:
    plain = BatchReader(mixed, WAY).read(range(6))[0]
    reader = BatchReader(mixed, WAY, augmentation=Augmentation(seed=1))
    assert np.array_equal(reader.read(range(6))[0], plain)
    assert not np.array_equal(reader.read(range(6), epoch=0)[0], plain)


def test_augmentation_is_fixed_by_seed_epoch_and_image(mixed: ImageSet) -> None:
    def read(order: list[int], *, seed: int = 1, epoch: int = 0, cache: int = 0) -> np.ndarray:
        augmentation = Augmentation(seed, max_shift=0.25)
        reader = BatchReader(mixed, WAY, cache_bytes=cache, augmentation=augmentation)
        return reader.read(order, epoch=epoch)[0]

    whole = read([0, 1, 2, 3, 4, 5])
    assert np.array_equal(read([4, 2]), whole[[4, 2]])
    assert np.array_equal(read([0, 1, 2, 3, 4, 5], cache=10**6), whole)
    assert not np.array_equal(read([0, 1, 2, 3, 4, 5], epoch=1), whole)
    assert not np.array_equal(read([0, 1, 2, 3, 4, 5], seed=2), whole)


def test_a_flip_without_a_shift_mirrors_some_images_and_keeps_the_rest() -> None:
    images = np.arange(20 * 3 * 4 * 4).astype(np.uint8).reshape(20, 3, 4, 4)
    changed = Augmentation(seed=0, max_shift=0.0).apply(images, np.arange(20), 0)
    mirrored = [np.array_equal(changed[i], images[i][..., ::-1]) for i in range(20)]
    unchanged = [np.array_equal(changed[i], images[i]) for i in range(20)]
    assert all(a != b for a, b in zip(mirrored, unchanged, strict=True))
    assert 3 <= sum(mirrored) <= 17
