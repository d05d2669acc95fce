"""``split-server init``: the settings that it writes, and what it refuses."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from protocol.errors import InvalidField
from protocol.settings import RunSettings
from split_server.cli import app


def run_init(*words: str | Path) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(app, ["init", *map(str, words)])
    return done.output, done.exception


def photos(folder: Path, side: int, *classes: str) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (side, side + 9)).save(folder / name / "1.png")
    return folder


@pytest.mark.parametrize(("side", "expected"), [(40, 56), (130, 112), (640, 224)])
def test_classes_and_image_size_follow_from_a_folder(
    tmp_path: Path, side: int, expected: int
) -> None:
    data, file = photos(tmp_path / "photos", side, "dog", 'a "cat"'), tmp_path / "run.toml"
    (data / "empty").mkdir()
    output, error = run_init("--data", data, "--out", file, "--devices", 3, "--rounds", 5)
    assert error is None, output
    settings = RunSettings.model_validate(tomllib.loads(file.read_text()))
    assert settings.class_names == ('a "cat"', "dog")
    assert (settings.model.num_classes, settings.model.image_size) == (2, expected)
    assert (settings.federation.min_participants, settings.federation.rounds) == (3, 5)
    assert f"create-run --config {file}" in output


def test_what_cannot_be_a_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    one_class = photos(tmp_path / "one", 50, "cat")
    for words in (["--classes", "cat"], ["--data", tmp_path / "absent"], ["--data", one_class], []):
        _, error = run_init(*words, "--out", file)
        assert isinstance(error, InvalidField)
        assert error.field in ("classes", "data")
    _, error = run_init("--classes", "cat,cat", "--out", file)
    assert isinstance(error, InvalidField)
    assert not file.exists()
    file.write_text("precious")
    _, error = run_init("--classes", "cat,dog", "--out", file)
    assert isinstance(error, InvalidField)
    assert file.read_text() == "precious"
