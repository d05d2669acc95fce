"""Runs of several processes over HTTP: bytes, restarts, repeatability, export, prediction."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edge_client.data.sources import load_dataset
from protocol.messages import Results, RunStatus
from protocol.traffic import Traffic
from split_model.checkpoints.export import load_exported
from tests.e2e.conftest import ServerProcess, small_run
from tests.e2e.devices import DeviceProcesses, Devices, DeviceThreads, run_to_the_end
from tests.support.commands import run_command

SETTINGS = small_run(devices=2, seed=6, rounds=3)


@dataclass(frozen=True)
class FinishedRun:
    results: Results
    devices: Devices


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of two device processes whose server stays up."""
    home = tmp_path_factory.mktemp("undisturbed")
    with closing(server.operator()) as operator:
        return FinishedRun(
            *run_to_the_end(operator, SETTINGS, lambda run: DeviceProcesses(server, run, 2, home))
        )


def test_server_and_devices_count_the_same_bytes_in_every_phase(undisturbed: FinishedRun) -> None:
    results = undisturbed.results
    assert results.run.status is RunStatus.FINISHED
    seen_by_devices = Traffic()
    for events in undisturbed.devices.events.values():
        [stopped] = [event for event in events if event["event"] == "stopped"]
        seen_by_devices.merge(Traffic.from_dict(stopped["traffic"]))
    assert results.traffic == seen_by_devices.to_dict()
    for phase in ("smashed", "gradients", "updates", "inference"):
        assert results.traffic[phase]["up"] > 0
    for phase in ("download", "features", "gradients", "updates", "inference"):
        assert results.traffic[phase]["down"] > 0


def test_the_bytes_of_split_training_are_those_of_the_papers_formula(
    undisturbed: FinishedRun,
) -> None:
    results = undisturbed.results
    tokens, width = 1 + 4 + 4, 64  # class token, prompts, 2 x 2 patches
    bytes_per_sample = tokens * width * 4
    selected = sum(view.samples for view in results.rounds)
    four_transfers = 4 * bytes_per_sample * selected
    split = sum(
        sum(results.traffic[phase].values()) for phase in ("smashed", "features", "gradients")
    )
    assert four_transfers < split < 1.06 * four_transfers  # the rest is headers


def test_a_server_killed_in_a_round_ends_with_the_same_state(
    undisturbed: FinishedRun, server: ServerProcess, tmp_path: Path
) -> None:
    """Also: devices in threads of one process train as the same devices in processes do."""
    killed: list[int] = []

    def kill_in_round_two(results: Results) -> None:
        if results.run.round == 2 and not killed:
            killed.append(2)
            server.kill_and_restart()

    with closing(server.operator()) as operator:
        disturbed, _ = run_to_the_end(
            operator,
            SETTINGS,
            lambda run: DeviceThreads(server.url, run, 2, tmp_path),
            kill_in_round_two,
        )
    assert killed
    assert [view.round for view in disturbed.rounds] == [1, 2, 3]
    assert disturbed.run.state == undisturbed.results.run.state


def test_an_exported_model_predicts_what_the_split_model_predicts(
    undisturbed: FinishedRun, server: ServerProcess, tmp_path: Path
) -> None:
    run, out = undisturbed.results.run.id, tmp_path / "model.safetensors"
    run_command(f"split-server export {run} --data-dir {server.data_dir} --out {out}")
    images = load_dataset("digits").test
    files = []
    for number in range(6):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(images.image(number).transpose(1, 2, 0).copy()).save(files[-1])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images_and_options = [*files, broken, "--json --top 10 --home", tmp_path / "home", "--run", run]
    command = " ".join(["edge-client predict", server.url, *map(str, images_and_options)])
    lines = run_command(command).stdout.splitlines()
    split = [json.loads(line)["classes"] for line in lines[:-1]]
    assert "error" in json.loads(lines[-1])
    whole = load_exported(out)
    with torch.no_grad():
        pixels = torch.stack([preprocessed(path) for path in files])
        probabilities = whole(pixels).softmax(dim=1)
    for row, classes in zip(probabilities, split, strict=True):
        expected = {str(label): probability for label, probability in enumerate(row.tolist())}
        assert classes == pytest.approx(expected, abs=1e-5)


def preprocessed(path: Path) -> torch.Tensor:
    """An image as timm prepares it for this backbone: mean 0.5, std 0.5, bicubic, 32 px."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(
        pixels[None], 32, mode="bicubic", antialias=True
    ).squeeze(0)
    return (resized.float() / 255 - 0.5) / 0.5
