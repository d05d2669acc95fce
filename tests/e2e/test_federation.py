"""Runs of several processes over HTTP: bytes, restarts, repeatability, export, prediction."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edge_client.data import load_dataset
from protocol.messages import Results, RunStatus
from protocol.plan import RunPlan
from protocol.traffic import Traffic
from sfprompt_bench.run.processes import Process, start_device
from split_model import load_exported
from tests.e2e.conftest import ServerProcess, small_run
from tuning_methods.custom.settings import Custom

LIMITS = ["--limit-train", "120", "--limit-test", "40", "--threads", "1"]


class Devices:
    """Edge clients as processes, with everything that they said."""

    def __init__(self, server: ServerProcess, run: str, count: int) -> None:
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.processes: list[Process] = []
        for number in range(1, count + 1):
            name = f"device-{number}"
            self.events[name] = []
            arguments = ["join", server.url, "--run", run, "--data", "digits", *LIMITS]
            arguments += ["--part", f"{number}/{count}", "--home", str(server.folder / name)]
            self.processes.append(
                start_device(name, arguments, server.folder, self._heard, threads=1)
            )

    def _heard(self, name: str, data: dict[str, Any]) -> None:
        self.events[name].append(data)

    def wait(self, seconds: float = 120) -> None:
        for process in self.processes:
            assert process.wait(seconds) == 0, process.last_lines()

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


def run_to_the_end(
    server: ServerProcess,
    settings: RunPlan,
    count: int,
    meanwhile: Callable[[Results], None] = lambda _results: None,
) -> tuple[Results, Devices]:
    """Start ``count`` devices, wait until the run and all of them are done."""
    with closing(server.operator()) as operator, ExitStack() as stack:
        run = operator.create_run(Custom.of(settings))
        devices = Devices(server, run.id, count)
        stack.callback(devices.stop)
        give_up_at = time.monotonic() + 120
        while True:
            results = operator.results(run.id)
            if results.run.status.is_over:
                break
            assert time.monotonic() < give_up_at, "the run does not end"
            meanwhile(results)
            time.sleep(0.05)
        devices.wait()
        return operator.results(run.id), devices


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbs, for all that can be seen of one."""

    results: Results
    devices: Devices


SETTINGS = small_run(devices=2, seed=6, rounds=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path_factory.mktemp("node"))
    yield running
    running.process.stop()


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> Reference:
    return Reference(*run_to_the_end(server, SETTINGS, 2))


def test_server_and_devices_count_the_same_bytes_in_every_phase(undisturbed: Reference) -> None:
    results = undisturbed.results
    assert results.run.status is RunStatus.FINISHED
    seen_by_devices = Traffic()
    for said in undisturbed.devices.events.values():
        [stopped] = [event for event in said if event["event"] == "stopped"]
        seen_by_devices.merge(Traffic.from_dict(stopped["traffic"]))
    assert results.traffic == seen_by_devices.to_dict()
    for phase in ("smashed", "gradients", "updates", "inference"):
        assert results.traffic[phase]["up"] > 0
    for phase in ("download", "features", "gradients", "updates", "inference"):
        assert results.traffic[phase]["down"] > 0


def test_the_bytes_of_split_training_are_those_of_the_papers_formula(
    undisturbed: Reference,
) -> None:
    results = undisturbed.results
    tokens, width = 1 + 4 + 4, 192  # class token, prompts, 2 x 2 patches
    one_sample = tokens * width * 4
    kept = sum(view.samples for view in results.rounds)
    four_legs = 4 * one_sample * kept
    split = sum(
        sum(results.traffic[phase].values()) for phase in ("smashed", "features", "gradients")
    )
    assert four_legs < split < 1.06 * four_legs  # the rest is headers


def test_the_same_seed_gives_the_same_state_though_the_server_is_killed_in_a_round(
    undisturbed: Reference, tmp_path: Path
) -> None:
    crashing = ServerProcess(tmp_path / "crashing")
    killed: list[int] = []

    def kill_in_round_two(results: Results) -> None:
        if results.run.round == 2 and not killed:
            killed.append(2)
            crashing.process.kill()
            crashing.start()

    try:
        disturbed, _ = run_to_the_end(crashing, SETTINGS, 2, kill_in_round_two)
    finally:
        crashing.process.stop()
    assert killed
    assert [view.round for view in disturbed.rounds] == [1, 2, 3]
    assert disturbed.run.state == undisturbed.results.run.state


def test_an_exported_model_alone_predicts_what_the_split_one_predicts(
    server: ServerProcess, tmp_path: Path
) -> None:
    results, _ = run_to_the_end(server, small_run(devices=1, rounds=1), 1)
    run, out = results.run.id, tmp_path / "model.safetensors"
    command(
        "split_server.cli", "export", run, "--data-dir", str(server.data_dir), "--out", str(out)
    )
    images = load_dataset("digits").test
    files = []
    for number in range(6):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(images.image(number).permute(1, 2, 0).numpy()).save(files[-1])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    lines = command(
        "edge_client.cli",
        *("predict", server.url, *map(str, files), str(broken)),
        *("--run", run, "--json", "--top", "10", "--home", str(tmp_path / "home")),
    ).splitlines()
    split = [json.loads(line)["classes"] for line in lines[:-1]]
    assert "error" in json.loads(lines[-1])
    whole = load_exported(out)
    with torch.no_grad():
        pixels = torch.stack([prepared(path) for path in files])
        shares = whole(pixels).softmax(dim=1)
    for row, classes in zip(shares, split, strict=True):
        expected = {str(label): share for label, share in enumerate(row.tolist())}
        assert classes == pytest.approx(expected, abs=1e-5)


def prepared(path: Path) -> torch.Tensor:
    """An image as timm prepares it for this backbone: half, half, bicubic, 32 px."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(
        pixels[None], 32, mode="bicubic", antialias=True
    ).squeeze(0)
    return (resized.float() / 255 - 0.5) / 0.5


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
