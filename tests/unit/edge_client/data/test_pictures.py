"""Picture files become the pixels that people see, whatever their format and mode."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from edge_client.data.errors import CorruptImageError, TooManyPixelsError
from edge_client.data.pictures import (
    FORMATS,
    SUFFIXES,
    convert_picture,
    parse_colour,
    read_picture,
)
from edge_client.data.torchvision_set import TorchvisionStore
from tools.picture_cases import ALPHA, COLOURS, Case, all_cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Pillow, while it writes the files
    CASES = all_cases()


def write(folder: Path, case: Case) -> Path:
    path = folder / f"picture{case.suffix}"
    path.write_bytes(case.data)
    return path


def test_the_cases_are_many_and_of_every_format() -> None:
    assert len(CASES) >= 60
    assert {case.format for case in CASES} - {"-"} == set(FORMATS)
    assert {case.suffix for case in CASES} <= SUFFIXES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format} {case.stored}")
def test_a_file_is_read_as_people_see_it(tmp_path: Path, case: Case) -> None:
    path = write(tmp_path, case)
    if case.expected is None:
        with pytest.raises(CorruptImageError) as refused:
            read_picture(path)
        assert refused.value.value == str(path)
        return
    pixels = read_picture(path).pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == case.expected.shape
    assert int(np.abs(pixels.astype(int) - case.expected).max()) <= case.tolerance


def test_reading_leaves_warnings_of_others_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, CASES[0])
    before = list(warnings.filters)
    read_picture(path)
    assert list(warnings.filters) == before


@pytest.mark.parametrize("background", ["#000000", "#0080ff"])
def test_transparent_parts_show_the_background(tmp_path: Path, background: str) -> None:
    image = Image.fromarray(COLOURS)
    image.putalpha(Image.fromarray(ALPHA))
    image.save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png", parse_colour(background))
    share = ALPHA[..., None] / 255
    expected = COLOURS * share + np.array(parse_colour(background)) * (1 - share)
    assert np.abs(picture.pixels - expected).max() <= 0.5
    assert [step.detail for step in picture.steps] == [f"transparent parts on {background}"]


@pytest.mark.parametrize("text", ["white", "#fff", "#gggggg", "ffffff"])
def test_a_colour_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="RRGGBB"):
        parse_colour(text)


def test_a_profile_of_srgb_changes_no_pixel(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(COLOURS).save(tmp_path / "x.png", icc_profile=profile)
    picture = read_picture(tmp_path / "x.png")
    assert np.array_equal(picture.pixels, COLOURS)
    assert picture.steps == ()


def test_an_image_that_another_library_opened_is_converted_alike(tmp_path: Path) -> None:
    for case in CASES:
        if case.stored in ("RGBA", "palette, a transparent entry", "float, 0 to 1"):
            with Image.open(write(tmp_path, case)) as image:
                pixels = convert_picture(image).pixels
            assert case.expected is not None
            assert int(np.abs(pixels.astype(int) - case.expected).max()) <= case.tolerance


def test_dim_data_is_scaled_by_the_bits_that_hold_it(tmp_path: Path) -> None:
    values = np.array([[0, 700, 1400, 2800]], np.uint16)  # 12 bits, underexposed
    Image.fromarray(values).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").pixels[0, :, 0].tolist() == [0, 44, 87, 174]


def test_no_plugin_but_those_listed_sees_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[str] = []
    opened = Image.open

    def recording(stream, mode="r", formats=None):
        offered.extend(formats)
        return opened(stream, mode, formats)

    monkeypatch.setattr(Image, "open", recording)
    read_picture(write(tmp_path, CASES[0]))
    assert set(offered) <= set(FORMATS)
    assert not {"EPS", "WMF", "PSD"} & set(FORMATS)


def test_a_header_of_too_many_pixels_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.data.pictures.MAX_PIXELS", 100)
    path = tmp_path / "x.png"
    Image.new("L", (11, 10)).save(path)
    with pytest.raises(TooManyPixelsError) as refused:
        read_picture(path)
    error = refused.value
    assert (error.field, error.limit, error.value) == ("pixels of an image", 100, str(path))
    assert "11 x 10 pixels" in str(error)


def test_a_bomb_by_pillows_own_measure_is_the_same_error(tmp_path: Path) -> None:
    (bomb,) = (case for case in CASES if "20,000" in case.stored)
    with pytest.raises(TooManyPixelsError):
        read_picture(write(tmp_path, bomb))


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(CorruptImageError, match="not a regular file"):
        read_picture(tmp_path / "x.png")


def test_the_spread_tells_pictures_of_almost_one_value(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (7, 8, 9)).save(tmp_path / "flat.png")
    assert read_picture(tmp_path / "flat.png").spread == 0
    assert read_picture(write(tmp_path, CASES[0])).spread == 255


def test_a_name_that_is_no_text_is_read_and_named_as_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xe9pe.png"))
    path.write_bytes(b"no picture")
    with pytest.raises(CorruptImageError) as refused:
        read_picture(path)
    assert str(refused.value.value).endswith("c\\xe9pe.png")
    Image.new("L", (3, 3)).save(path)
    assert read_picture(path).pixels.shape == (3, 3, 3)


def test_a_torchvision_set_that_opens_files_itself_reaches_none_of_pillows_other_formats(
    tmp_path: Path,
) -> None:
    """Pillow's plugin for EPS would run a program; sets such as DTD call Pillow themselves."""
    flower = Image.new("RGB", (8, 8), (9, 99, 199))
    flower.save(tmp_path / "0.png")
    flower.save(tmp_path / "script.eps")
    (tmp_path / "script.eps").rename(tmp_path / "1.jpg")

    class Flowers(list[Path]):
        def __getitem__(self, index: Any) -> Any:
            return Image.open(super().__getitem__(index)).convert("RGB"), 0

    half = Flowers(tmp_path / name for name in ("0.png", "1.jpg"))
    store = TorchvisionStore("Flowers", half)
    assert store.read(0)[:, 0, 0].tolist() == [9, 99, 199]
    with pytest.raises(CorruptImageError, match="cannot identify image file"):
        store.read(1)
    assert "EPS" in Image.ID  # other code of this process opens what it likes
