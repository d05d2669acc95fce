"""Each picture is decoded once before the first step, and what that yields is used later."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from edge_client.data.batches import BatchReader, Preprocessing
from edge_client.data.dataset import by_content
from edge_client.data.errors import PreprocessingError
from edge_client.data.folder import load_folder

MEAN = (0.5, 0.4, 0.3)

STD = (0.2, 0.3, 0.4)

CACHE = 2**20


def preprocessing(**more: object) -> Preprocessing:
    return Preprocessing(8, MEAN, STD, **more)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            image = Image.effect_noise((20 + number, 12), 90).convert("RGB")
            image.save(tmp_path / name / f"{number}.png")
    return tmp_path


def count_decodings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often Pillow opens each file."""
    opened, open_ = Counter[str](), Image.open

    def counting(stream, *arguments, **more):
        opened[str(stream.name)] += 1
        return open_(stream, *arguments, **more)

    monkeypatch.setattr(Image, "open", counting)
    return opened


def test_joining_and_the_first_epoch_decode_each_picture_once(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, done = count_decodings(monkeypatch), []
    form = preprocessing()
    data = by_content(
        load_folder(
            photos,
            held_out=0.5,
            seed=0,
            preprocessing=form,
            cache_bytes=CACHE,
            progress=lambda count, total: done.append((count, total)),
        )
    )
    batches = [
        BatchReader(part, form, cache_bytes=CACHE).read(range(6))[0]
        for part in (data.train, data.test)
    ]
    assert set(opened.values()) == {1}
    assert len(opened) == 12
    assert done == [(count, 12) for count in range(1, 13)]
    data.drop_resized()
    again = [BatchReader(part, form).read(range(6))[0] for part in (data.train, data.test)]
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


@pytest.mark.parametrize("change", [{"fit": "pad"}, {"interpolation": "bilinear"}])
def test_another_form_of_resizing_decodes_again(photos: Path, change: dict[str, str]) -> None:
    data = load_folder(
        photos, held_out=0.5, seed=0, preprocessing=preprocessing(), cache_bytes=CACHE
    )
    other = preprocessing(**change)
    plain = load_folder(photos, held_out=0.5, seed=0)
    expected = BatchReader(plain.train, other).read(range(6))[0]
    read = BatchReader(data.train, other, cache_bytes=CACHE).read(range(6))[0]
    assert np.array_equal(read, expected)


def test_the_memory_of_resized_images_is_bounded(photos: Path) -> None:
    form = preprocessing()
    data = load_folder(
        photos, held_out=0.5, seed=0, preprocessing=form, cache_bytes=3 * form.bytes_per_image
    )
    taken = [data.train.store.take_resized(i, form.form) for i in range(6)]
    taken += [data.test.store.take_resized(i, form.form) for i in range(6)]
    assert sum(image is not None for image in taken) == 3


def test_the_order_by_content_is_that_of_the_decoded_images(photos: Path) -> None:
    hashed = by_content(load_folder(photos, held_out=0.5, seed=0))
    paths = hashed.train.store.paths
    unhashed = type(hashed.train.store)(paths, photos)
    digests = [unhashed.digest(position) for position in range(len(paths))]
    assert digests == sorted(digests)


# Images that are not square


def wide_image() -> Image.Image:
    image = Image.effect_noise((30, 12), 90).convert("RGB")
    return image.resize((60, 24), Image.Resampling.BICUBIC)


def resized(image: Image.Image, **more: object) -> np.ndarray:
    return preprocessing(**more).resize(from_pillow(image))


def from_pillow(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("turn", [False, True])
def test_each_fit_is_what_pillow_does(turn: bool) -> None:
    image = wide_image().transpose(Image.Transpose.ROTATE_90) if turn else wide_image()
    bicubic, middle = Image.Resampling.BICUBIC, (0, 18, 24, 42) if turn else (18, 0, 42, 24)
    expected = {
        "crop": image.crop(middle).resize((8, 8), bicubic),
        "pad": ImageOps.pad(image, (8, 8), bicubic, color=(9, 99, 199)),
        "stretch": image.resize((8, 8), bicubic),
    }
    for fit, other in expected.items():
        ours = resized(image, fit=fit, background=(9, 99, 199))
        assert ours.shape == (3, 8, 8)
        assert np.array_equal(ours, from_pillow(other)), fit


def test_padding_bounds_its_memory_by_the_models_size() -> None:
    line = np.zeros((3, 1, 200_000), np.uint8)
    assert preprocessing(fit="pad").resize(line).shape == (3, 8, 8)
    assert preprocessing(fit="pad").resize(line)[:, 4].tolist() in (
        [[0] * 8] * 3,
        [[255] * 8] * 3,
    )


def test_a_square_image_is_the_same_in_each_fit() -> None:
    image = wide_image().resize((33, 33))
    forms = [resized(image, fit=fit) for fit in ("crop", "pad", "stretch")]
    assert np.array_equal(forms[0], forms[1])
    assert np.array_equal(forms[0], forms[2])


def test_an_unknown_fit_is_refused_by_name() -> None:
    with pytest.raises(PreprocessingError) as refused:
        preprocessing(fit="zoom")
    assert refused.value.field == "fit"
