"""A missing extra for an experiment tracker is an error before any run starts."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from protocol.errors import NotFound
from sfprompt_bench.cli import app


@pytest.mark.parametrize(
    ("option", "package"), [("--tensorboard", "tensorboard"), ("--mlflow", "mlflow")]
)
def test_a_missing_extra_is_named_before_anything_is_begun(
    option: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine without the package: not on the path, and not imported.
    monkeypatch.delitem(sys.modules, package, raising=False)
    keep = [place for place in sys.path if not (Path(place) / package).exists()]
    monkeypatch.setattr(sys, "path", keep)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", "--quick", "--out", str(out), option, "x"])
    assert isinstance(done.exception, NotFound)
    assert done.exception.field == package
    assert f".[{package}]" in str(done.exception)
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["some.toml", "--quick"]])
def test_a_comparison_needs_a_file_or_the_quick_setting(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert "compare takes a file, or --quick" in str(done.exception)
