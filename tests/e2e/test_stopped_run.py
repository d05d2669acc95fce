"""Whoever stops a run on one machine leaves none of its processes behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("words", [["run"], ["compare", "--quick", "--at-once", "2"]], ids=" ".join)
def test_server_and_devices_end_with_the_command(
    tmp_path: Path, words: list[str], how: signal.Signals
) -> None:
    command = [sys.executable, "-m", "sfprompt_bench.cli", *words, "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as main:
        processes = wait_for_children(psutil.Process(main.pid))
        main.send_signal(how)
        assert main.wait(60) == 130
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def heed_interrupts() -> None:
    """As in a terminal: what a shell runs in the background ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_children(main: psutil.Process, most_s: float = 60) -> list[psutil.Process]:
    """The processes that it has started, once there are some."""
    end = time.monotonic() + most_s
    while not (found := main.children(recursive=True)):
        assert time.monotonic() < end, "nothing was started"
        time.sleep(0.1)
    return found
