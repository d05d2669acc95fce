"""Runs every command of README, quick start and CONTRIBUTING, as a reader would run it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_client.data.sources import load_dataset
from sfprompt_bench.presets import PRESETS
from sfprompt_bench.run.preflight import choose_port
from sfprompt_bench.run.processes import wait_until_healthy
from split_server.client import OperatorClient, read_token
from tests.support.commands import run_command
from tests.support.processes import CommandProcess

ROOT = Path(__file__).parents[2]

BIN = Path(sys.executable).parent

PAGES = ("README.md", "docs/quickstart.md", "CONTRIBUTING.md")

CLASSES = ("cat", "dog")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands_of(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]


# Each command once, in the order of its first page.
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))

TARGETS = ("test", "lint", "format", "docs")


def test_this_file_runs_every_command_of_the_pages() -> None:
    known = ("make run", *(f"make {target}" for target in TARGETS))
    known += ("pip install", "split-server", "edge-client")
    assert [command for command in COMMANDS if not command.startswith(known)] == []
    assert {page: len(commands_of(page)) for page in PAGES} == {
        "README.md": 10,
        "docs/quickstart.md": 13,
        "CONTRIBUTING.md": 4,
    }


def test_the_readme_is_the_short_form_of_the_quick_start() -> None:
    assert set(commands_of("README.md")) <= set(commands_of("docs/quickstart.md"))


def test_make_run_tunes_and_leaves_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = f"--devices 1 --rounds 1 --limit-train 32 --limit-test 20 --out {tmp_path}/run"
    # The environment that runs this test stands in for the one that make would set up.
    stamp = tmp_path / "installed"
    stamp.touch()
    environment = [f"VENV={BIN.parent}", f"STAMP={stamp}"]
    done = subprocess.run(
        ["make", "run", *environment, f"ARGS={smaller}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy" in done.stdout
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"tuned.safetensors", "history.jsonl", "accuracy.png", "bytes.png"} <= left
    [later] = blocks("docs/quickstart.md", "text")
    export, predict = later.replace(".venv/bin/", "").splitlines()
    run = json.loads((tmp_path / "run" / "result.json").read_text())["run"]
    monkeypatch.chdir(tmp_path)
    run_command(export.replace("RUN", run).replace("runs/DATA-TIME", "run"))
    images = load_dataset("digits").test
    Image.fromarray(images.image(0).transpose(1, 2, 0).copy()).save(tmp_path / "digit.png")
    assert "digit.png" in run_command(predict.replace("IMAGE_OR_FOLDER", "digit.png")).output


def test_make_run_takes_the_name_of_the_images() -> None:
    commands = [command for command in COMMANDS if command.startswith("make run")]
    digits, fashion = (run_process(f"{command} -n STAMP=README.md") for command in commands)
    assert "--data digits" in digits
    assert fashion == digits.replace("digits", "fashion-mnist")
    assert PRESETS.keys() == {"digits", "fashion-mnist"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_make_targets_of_development_call_what_they_say(target: str) -> None:
    # Running `make test` here would run this test again; .ci/run runs test and lint.
    assert f"make {target}" in COMMANDS
    if target in ("test", "lint"):
        assert f"make {target}" in (ROOT / ".ci" / "run").read_text()
    printed = run_process(f"make -n {target} STAMP=README.md")
    calls = {"test": "pytest", "lint": "mypy", "format": "ruff format", "docs": "settings_page"}
    assert calls[target] in printed


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip install")])
def test_the_extras_that_are_installed_exist(command: str) -> None:
    output = run_process(f"{command} --dry-run --no-deps --quiet --no-build-isolation")
    assert "does not provide the extra" not in output


def run_process(command: str, folder: Path = ROOT) -> str:
    words = shlex.split(command)
    if words[0] == "pip":
        words = [sys.executable, "-m", *words]
    elif (BIN / words[0]).exists():
        words[0] = str(BIN / words[0])
    done = subprocess.run(
        words,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of real images, as a folder of class folders."""
    digits = load_dataset("digits").train
    for label, name in enumerate(CLASSES):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        chosen = [i for i in range(len(digits)) if digits.label(i) == label][:20]
        for number in chosen:
            pixels = digits.image(number).transpose(1, 2, 0).copy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_hosting_joining_watching_exporting_and_predicting(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and device are processes; the other commands run in this one."""
    folder, port = photos.parent, choose_port(0)
    monkeypatch.chdir(folder)
    (folder / "run.example.toml").write_text(
        (ROOT / "run.example.toml")
        .read_text()
        .replace("rounds = 8", "rounds = 1")
        .replace("min_participants = 6", "min_participants = 1")
    )
    hosted = [c for c in COMMANDS if c.startswith(("split-server", "edge-client"))]
    places = {"gpu-node:8500": f"127.0.0.1:{port}"}
    certs, serve, create, join, *later = [_placed(command, places) for command in hosted]
    assert serve.startswith("split-server serve")
    run_command(certs)
    for name in ("ca.pem", "join.token"):  # as a person copies them to each device
        shutil.copy(folder / "certs" / name, folder / name)
    words = [*shlex.split(serve)[1:], "--port", str(port)]
    server = CommandProcess("split_server.cli", words, folder / "server.log", cwd=folder)
    url, ca_file = f"https://127.0.0.1:{port}", folder / "ca.pem"
    try:
        probe = OperatorClient(url, ca_file=ca_file)
        wait_until_healthy(server, probe.is_healthy, 60)
        probe.close()
        run_command(create)
        client = OperatorClient(url, read_token(folder / "sfprompt-data"), ca_file)
        [run] = client.runs()
        client.close()
        run_process(join, folder)
        for command in later:
            output = run_command(command.replace("RUN", run.id)).output
            if " watch " in command:
                assert "run_finished" in output
            elif " predict " in command:
                assert any(name in output for name in CLASSES)
        model = folder / "model.safetensors"
        assert model.stat().st_size > 1e6
        *_, snippet = blocks("docs/quickstart.md", "python")  # of the exported model
        (folder / "snippet.py").write_text(snippet)
        assert runpy.run_path("snippet.py")["logits"].shape == (1, 2)
    finally:
        server.stop()


def _placed(command: str, places: dict[str, str]) -> str:
    for there, here in places.items():
        command = command.replace(there, here)
    return command
