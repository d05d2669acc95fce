"""What `edge-client check` finds in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.data.check import Report, check_folder
from edge_client.data.folder import load_folder


def photo(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Make a smooth picture that differs from those of other numbers."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes in train/ and test/, without a fault."""
    number = 0
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for _ in range(count):
                photo(number).save(folder / f"{number}.png")
                number += 1
    return tmp_path


def found(report: Report) -> set[tuple[str, str]]:
    return {(f.kind, Path(f.path.split(" (")[0]).name) for f in report.findings}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.stdout


def test_a_sound_folder_is_counted_and_has_no_finding(photos: Path) -> None:
    report = check_folder(photos)
    assert report.layout == "test folder"
    assert report.classes == {"cat": {"train": 4, "test": 2}, "dog": {"train": 4, "test": 2}}
    assert report.sizes == {"64 x 48": 12}
    assert report.findings == []
    code, out = run(str(photos))
    assert code == 0
    assert "no findings" in out


def test_the_held_out_images_are_those_of_joining(photos: Path) -> None:
    data = load_folder(photos / "train", held_out=0.5, seed=3)
    report = check_folder(photos / "train", held_out=0.5, seed=3)
    assert report.layout == "held-out share"
    assert report.classes["cat"] == {"train": 2, "test": 2}
    trained, held = (
        next(path for path in part.store.paths if path.parent.name == "cat")  # type: ignore[attr-defined]
        for part in (data.train, data.test)
    )
    held.write_bytes(trained.read_bytes())
    findings = check_folder(photos / "train", held_out=0.5, seed=3).findings
    assert [(f.kind, f.is_problem) for f in findings] == [("leak", True)]


def test_equal_and_similar_pictures_are_told_by_where_they_lie(photos: Path) -> None:
    train, test = photos / "train", photos / "test"
    photo(0).save(train / "cat" / "same.bmp")  # a duplicate in training
    photo(1).save(test / "cat" / "leaked.tif")  # in training and test
    photo(2).resize((32, 24)).save(test / "cat" / "smaller.jpg", quality=80)  # nearly so
    photo(5).save(train / "cat" / "both.png")  # also a dog
    photo(6).save(train / "dog" / "small.jpg", quality=85)  # looks like another of its class
    kinds = {f.kind: (f.path, f.reason) for f in check_folder(photos).findings}
    listed = sorted(f.kind for f in check_folder(photos).findings)
    assert listed == ["conflict", "duplicate", "leak", "leak", "near duplicate"]
    assert "classes cat and dog" in kinds["conflict"][1]
    assert "looks like" in kinds["near duplicate"][1]
    assert not any(
        f.is_problem for f in check_folder(photos).findings if f.kind == "near duplicate"
    )


def test_oddities_are_named(photos: Path) -> None:
    cat = photos / "train" / "cat"
    Image.new("RGB", (64, 48), (9, 9, 9)).save(cat / "flat.png")
    photo(90, (400, 12)).save(cat / "strip.png")
    photo(91, (900, 60)).save(cat / "long.png")
    photo(92).save(cat / "x_thumb.png")
    (cat / "@eaDir").mkdir()
    (cat / "._0.png").write_bytes(b"x")
    (cat / "broken.png").write_bytes(b"no picture")
    (cat / "photo.heic").write_bytes(b"")
    (cat / "notes.txt").write_text("notes")
    report = check_folder(photos)
    assert found(report) == {
        ("one value", "flat.png"),
        ("odd size", "strip.png"),
        ("odd size", "long.png"),
        ("machine-made", "x_thumb.png"),
        ("machine-made", "cat"),
        ("unreadable", "broken.png"),
        ("skipped", "photo.heic"),
        ("skipped", "notes.txt"),
    }
    problems = {Path(f.path).name for f in report.findings if f.is_problem}
    assert problems == {"flat.png", "x_thumb.png", "broken.png", "photo.heic"}


def test_classes_are_compared_with_those_of_the_run(photos: Path) -> None:
    report = check_folder(photos, class_names=["cat", "emu"])
    assert found(report) == {("unknown class", "dog"), ("missing class", "emu")}
    assert report.classes == {"cat": {"train": 4, "test": 2}, "emu": {"train": 0, "test": 0}}
    code, out = run(f"folder:{photos}", "--classes", "cat, emu", "--json")
    shown = json.loads(out)
    assert code == 1
    assert shown["has_problems"] is True
    assert {finding["kind"] for finding in shown["findings"]} == {"unknown class", "missing class"}


def test_conversions_are_counted(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    photo(70).save(photos / "train" / "cat" / "turned.png", exif=exif)
    report = check_folder(photos)
    assert report.converted == {"turned": 1}
    assert report.sizes == {"64 x 48": 12, "48 x 64": 1}


def test_a_text_shows_counts_and_findings(photos: Path) -> None:
    (photos / "train" / "cat" / "broken.png").write_bytes(b"no picture")
    code, out = run(str(photos))
    assert code == 1
    for word in ("cat", "unreadable: 1", "broken.png", "64 x 48 (12)"):
        assert word in out


@pytest.mark.parametrize("arguments", [["absent"], [".", "--background", "white"]])
def test_what_cannot_be_checked_is_an_error(arguments: list[str], tmp_path: Path) -> None:
    code, _ = run(*arguments)
    assert code != 0
