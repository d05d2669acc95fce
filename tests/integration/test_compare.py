"""A whole comparison with processes and HTTP, and its continuation in the same folder."""

import csv
import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_client.data.download import CACHE_VARIABLE
from sfprompt_bench.cli import app

TINY = """
data = "digits"
devices = 1
rounds = 1
shots = 4
limit_test = 20
methods = ["sfprompt", "linear-probe"]
target_accuracy = 0.01

[model]
backbone = "vit_tiny_patch16_224"
weights = "random:3"
image_size = 32

[method]
prompt_count = 4

[federation]
dp_clip = 0.5
dp_noise_multiplier = 2.0
dp_delta = 1e-2
dp_seed = 7
"""


def compare(folder: Path, file: Path) -> str:
    """Run the command and return its output."""
    arguments = ["compare", str(file), "--out", str(folder / "out"), "--at-once", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(folder / "c.json")])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_comparison_runs_measures_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    output = compare(tmp_path, file)
    assert "worst device" in output
    assert "epsilon" in output
    out = tmp_path / "out"
    methods = json.loads((tmp_path / "c.json").read_text())["methods"]
    assert set(methods) == {"sfprompt", "linear-probe"}
    figures = methods["sfprompt"]
    # The probe's features need no training; 10 classes make 10 % by chance.
    assert 0 <= figures["accuracy_worst_client"] <= figures["accuracy"] <= 1
    assert figures["bytes_start"] < figures["bytes_total"] == figures["bytes_all_devices"]
    # Head, classifier and norm are known numbers; what is around them is less than 2 %.
    assert figures["bytes_total"] > figures["calculated"]["bytes_start"]
    assert figures["bytes_up_per_round"] > 0
    assert figures["bytes_down_per_round"] > 0
    assert figures["device_peak_bytes"] > 50_000_000
    assert figures["device_seconds"] > 0.5
    assert figures["server_seconds"] > 0.5
    assert figures["curve"][-1]["accuracy"] == figures["accuracy"]
    # One round, everybody in it: 1.1640594 by hand at order 7, and no better one is far off.
    assert 1.1 < figures["epsilon"] <= 1.1640594
    assert methods["linear-probe"]["trainable_parameters"] == 10 * (192 + 1)
    assert methods["linear-probe"]["bytes_total"] is None
    assert methods["linear-probe"]["epsilon"] is None
    # What is tuned beside the classifier: the norm, and four prompts for each of eleven blocks.
    tuned = methods["sfprompt"]["trainable_parameters"]
    assert tuned == 10 * (192 + 1) + 2 * 192 + 11 * 4 * 192
    assert (out / "comparison.html").read_text().count("<svg") == 4
    assert len(list(csv.reader((out / "comparison.csv").read_text().splitlines()))) == 3
    assert tomllib.loads((out / "comparison.toml").read_text())["rounds"] == 1
    files = sorted(out.glob("tasks/*/task.json"))
    assert len(files) == 2
    assert not list(out.glob("tasks/*/devices"))

    before = [file.stat().st_mtime_ns for file in files]
    compare(tmp_path, out / "comparison.toml")  # the file that it left
    assert [file.stat().st_mtime_ns for file in sorted(out.glob("tasks/*/task.json"))] == before
    assert json.loads((tmp_path / "c.json").read_text())["methods"] == methods
