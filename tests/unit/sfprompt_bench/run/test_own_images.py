"""Settings of a run on a folder of one's own images follow from the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edge_client.data.errors import MissingDataError
from protocol.errors import InvalidField
from protocol.presets import FORMS
from sfprompt_bench.run.choice import choose_preset, folder_preset


def photos(root: Path, side: int, *classes: str) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for colour in (40, 200):
            picture = Image.new("RGB", (side, side + 9), (colour, number, 0))
            picture.save(root / name / f"{colour}.png")
    return root


@pytest.mark.parametrize(("side", "expected"), [(28, 56), (640, 112)])
def test_classes_are_the_folders_and_the_size_follows_the_images(
    tmp_path: Path, side: int, expected: int
) -> None:
    root = photos(tmp_path / "photos", side, "wren", "heron")
    preset = folder_preset(root, "default")
    settings = preset.settings
    assert settings.class_names == ("heron", "wren")
    assert (settings.model.num_classes, settings.model.image_size) == (2, expected)
    assert (settings.name, preset.data) == ("photos", f"folder:{root}")
    assert folder_preset(root, "paper", 42).settings.model.image_size == 42


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_named_with_or_without_its_kind(tmp_path: Path, form: str) -> None:
    root = photos(tmp_path, 28, "a", "b")
    plain = choose_preset(str(root), form, None)
    assert plain == choose_preset(f"folder:{root}", form, None)


def test_files_that_are_no_pictures_do_not_matter_for_the_size(tmp_path: Path) -> None:
    root = photos(tmp_path, 28, "a", "b")
    (root / "a" / "broken.jpg").write_bytes(b"no picture")
    assert folder_preset(root, "default").settings.model.image_size == 56


def test_a_folder_of_one_class_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="two classes") as caught:
        folder_preset(photos(tmp_path, 28, "only"), "default")
    assert caught.value.value == ["only"]
    with pytest.raises(MissingDataError):
        folder_preset(tmp_path / "absent", "default")
