"""What a device keeps of a run across a restart."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edge_client.storage.run_memory import Residuals, RunMemory


def test_start_and_residuals_are_read_again(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, "run", "p0001")
    memory.keep_start(2, 0.125)
    same = np.array([[1.0, -2.0]], np.float32)
    memory.keep_residuals(
        Residuals("ab", {"w": same, "zero": np.zeros(3, np.float32)}, {"w": same})
    )
    again = RunMemory(tmp_path, "run", "p0001")
    assert again.start == (2, 0.125)
    assert again.residuals.base == "ab"
    assert again.residuals.before.keys() == again.residuals.after.keys() == {"w"}
    np.testing.assert_array_equal(again.residuals.after["w"], same)
    assert RunMemory(tmp_path, "run", "p0002").start is None


def test_a_file_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, "run", "p0001")
    memory.keep_start(0, 1.0)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert RunMemory(tmp_path, "run", "p0001").start in (None, (0, 1.0))
    path.write_bytes(b"\xff" * 50)
    assert RunMemory(tmp_path, "run", "p0001").start is None
    memory.forget()
    assert not list(tmp_path.iterdir())


def test_files_of_runs_that_the_device_never_returns_to_go(tmp_path: Path) -> None:
    for run in ("old", "recent", "own"):
        RunMemory(tmp_path, run, "p0001").keep_start(0, 1.0)
        (path,) = {*tmp_path.iterdir()} - {*tmp_path.glob("kept-*")}
        path.rename(tmp_path / f"kept-{run}.safetensors")
    left = tmp_path / ".another.1.tmp"
    left.touch()
    for path in (tmp_path / "kept-old.safetensors", left):
        os.utime(path, (1_000_000,) * 2)
    RunMemory(tmp_path, "next", "p0001")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kept-own.safetensors",
        "kept-recent.safetensors",
    ]


def test_a_file_that_is_read_counts_as_used(tmp_path: Path) -> None:
    RunMemory(tmp_path, "run", "p0001").keep_start(0, 1.0)
    (path,) = tmp_path.iterdir()
    os.utime(path, (1_000_000,) * 2)
    assert RunMemory(tmp_path, "run", "p0001").start == (0, 1.0)
    assert RunMemory(tmp_path, "other", "p0001").start is None
    assert path.exists()
