"""The operator's commands: what they refuse before they ask a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from protocol.errors import InvalidField, NotFound, SFPromptError, Unreachable
from split_server.cli import app


def error_of(*words: str) -> SFPromptError:
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SFPromptError), done.output
    return done.exception


def test_a_settings_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[federation]\nrounds = 3\n", encoding="utf-8-sig")
    url = ["--url", "http://127.0.0.1:1", "--operator-token", "12345678"]
    assert isinstance(error_of("create-run", "--config", str(file), *url), Unreachable)


@pytest.mark.parametrize("words", [["model.pt"], ["model.onnx", "--format", "pt2"]])
def test_a_model_is_exported_as_what_its_name_says(tmp_path: Path, words: list[str]) -> None:
    name, *options = words
    out = str(tmp_path / name)
    error = error_of("export", "r1", "--data-dir", str(tmp_path), "--out", out, *options)
    assert isinstance(error, InvalidField)
    assert (error.field, error.value) == ("out", out)


def test_an_existing_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"precious")
    words = ["export", "r1", "--data-dir", str(tmp_path / "absent"), "--out", str(out)]
    error = error_of(*words)
    assert isinstance(error, InvalidField)
    assert "--force" in str(error)
    assert isinstance(error_of(*words, "--force"), NotFound), "it goes on to the data folder"
    assert out.read_bytes() == b"precious"
