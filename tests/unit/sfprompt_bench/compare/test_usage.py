"""Memory and processor time of one run's processes, measured from outside."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfprompt_bench.compare.usage import UsageWatch

# Takes 64 MB, and processor time until it is killed.
BUSY = "import sys; held = bytearray(64 * 2**20); print('ready', flush=True)\nwhile True: pass"


def start(*words: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", BUSY, *words], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def end(*children: subprocess.Popen[bytes]) -> None:
    for child in children:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def test_only_the_processes_of_the_run_are_measured(
    tmp_path: Path,
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "mine-too"
    children = [
        start("split_server.cli", "--data-dir", f"{mine}/server"),
        start("edge_client.cli", "--home", f"{mine}/devices/1", "--name", "device-1"),
        start("edge_client.cli", "--home", f"{other}/devices/1", "--name", "device-9"),
    ]
    try:
        with UsageWatch(mine) as watch:
            time.sleep(1.5)
    finally:
        end(*children)
    assert len(watch.devices()) == 1
    for usage in (watch.server(), *watch.devices()):
        assert 64 * 2**20 < usage.peak_bytes < 512 * 2**20
        assert 0.01 < usage.cpu_seconds < 60


def test_a_run_without_processes_has_no_usage(tmp_path: Path) -> None:
    with UsageWatch(tmp_path) as watch:
        pass
    assert watch.devices() == []
    assert watch.server().peak_bytes == pytest.approx(0)
