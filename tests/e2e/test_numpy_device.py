"""The default form on a device without torch, beside devices that compute with torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from protocol.settings import RunSettings
from split_model.checkpoints.state import load_state
from tests.e2e.conftest import ServerProcess

# First on the path of the devices: these libraries cannot be imported.
WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision", "sklearn", "scipy", "onnx"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Refuse())
"""

CLASSES = ("bright", "dark", "striped")

IMAGES = 24  # of each class on each device

# Bytes of a phase: paths name runs, whose ids differ in length, and losses in their digits.
DIGITS = 32

MEMORY = 256 * 1024**2  # bytes that a device without torch may allocate


def settings() -> RunSettings:
    return RunSettings.model_validate(
        {
            "class_names": CLASSES,
            "model": {
                "backbone": "test_vit",
                "weights": "random:3",
                "image_size": 32,
                "num_classes": len(CLASSES),
            },
            "method": {"name": "sfprompt", "rank": 8},
            "federation": {"rounds": 2, "min_participants": 2, "patience": 5},
            # Exact codecs: a difference of the last digit must not become one of a code.
            "wire": {"smashed": "float32", "start": "float32", "updates": "float32"},
        }
    )


def photos(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = rng.normal(128, 40, (40, 48, 3))
            pixels += {"bright": 50, "dark": -50, "striped": 0}[name]
            pixels[:: 2 if name == "striped" else 41] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def start(
    server: ServerProcess, run: str, home: Path, number: int, compute: str
) -> subprocess.Popen[str]:
    """Start a device as a process of its own, which imports everything anew."""
    blocked = home / "without-torch"
    blocked.mkdir(parents=True, exist_ok=True)
    (blocked / "sitecustomize.py").write_text(WITHOUT_TORCH)
    root = str(Path(__file__).parents[2])
    path = [root] if compute == "torch" else [str(blocked), root]
    command = [sys.executable, "-m", "edge_client.cli", "join", server.url, "--run", run]
    command += ["--data", f"folder:{home / f'photos-{number}'}", "--name", f"device-{number}"]
    command += ["--home", str(home / f"home-{number}"), "--compute", compute]
    return subprocess.Popen(
        [*command, "--progress", "json", "--threads", "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=None if compute == "torch" else limit_memory,
    )


def run_with(
    server: ServerProcess, home: Path, computes: tuple[str, str]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Run two devices to the end; return the bytes they counted, and the final state."""
    for number in range(2):
        photos(home / f"photos-{number}", number)
    with closing(server.operator()) as operator:
        run = operator.create_run(settings())
        devices = [
            start(server, run.id, home, number, compute) for number, compute in enumerate(computes)
        ]
        outputs = [device.communicate(timeout=120)[0] for device in devices]
        assert [device.returncode for device in devices] == [0, 0], outputs
        view = operator.results(run.id).run
    events = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert [event["status"] for event in events] == ["finished"] * 2
    phases = ("download", "smashed", "features", "updates", "inference")
    sent = [{phase: event["traffic"][phase] for phase in phases} for event in events]
    state = server.data_dir / "runs" / run.id / "states" / f"{view.state.sha256}.safetensors"
    return sent, load_state(state)


def test_devices_with_and_without_torch_give_one_result_for_the_same_bytes(
    server: ServerProcess, tmp_path: Path
) -> None:
    torch_bytes, expected = run_with(server, tmp_path / "torch", ("torch", "torch"))
    for computes in (("numpy", "numpy"), ("torch", "numpy")):
        sent, state = run_with(server, tmp_path / "-".join(computes), computes)
        for device, other in zip(sent, torch_bytes, strict=True):
            for phase, counted in device.items():
                assert counted == pytest.approx(other[phase], abs=DIGITS), phase
        for name, value in expected.items():
            scale = float(value.abs().max())
            assert float((state[name] - value).abs().max()) <= 1e-4 * scale, name


def test_a_run_that_trains_prompts_is_refused_before_anything_is_read(
    server: ServerProcess, tmp_path: Path
) -> None:
    photos(tmp_path / "photos-0", 0)
    with closing(server.operator()) as operator:
        run = operator.create_run(
            RunSettings.model_validate(
                {
                    "class_names": CLASSES,
                    "model": {
                        "backbone": "test_vit",
                        "weights": "random:3",
                        "image_size": 32,
                        "num_classes": len(CLASSES),
                    },
                    "method": {"name": "sfprompt-paper"},
                }
            )
        )
        device = start(server, run.id, tmp_path, 0, "auto")
        output, _ = device.communicate(timeout=60)
        assert device.returncode == 2, output
        assert 'pip install "sfprompt[device-torch]"' in output
        assert operator.results(run.id).run.participants == 0
