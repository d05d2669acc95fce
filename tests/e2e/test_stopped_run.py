"""A command that is stopped on one machine leaves none of its processes behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

# The command's handler treats both signals alike, so each command is stopped by one of them.
STOPPED = [
    (["run"], signal.SIGINT),
    (["compare", "--quick", "--at-once", "2"], signal.SIGTERM),
]


@pytest.mark.parametrize(("arguments", "stop_signal"), STOPPED, ids=["run", "compare"])
def test_server_and_devices_end_with_the_command(
    tmp_path: Path, arguments: list[str], stop_signal: signal.Signals
) -> None:
    with bench_process([*arguments, "--out", str(tmp_path / "run")]) as main:
        children = wait_for_children(psutil.Process(main.pid))
        main.send_signal(stop_signal)
        assert main.wait(60) == 130
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@contextmanager
def bench_process(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """``sfprompt-bench`` as a process; killed with its children if a test fails."""
    command = [sys.executable, "-m", "sfprompt_bench.cli", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=accept_interrupts
    ) as main:
        try:
            yield main
        finally:
            if main.poll() is None:
                for process in [*psutil.Process(main.pid).children(recursive=True), main]:
                    process.kill()


def accept_interrupts() -> None:
    """Restore SIGINT's default, as in a terminal: shells ignore it for background processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_children(main: psutil.Process, timeout_s: float = 60) -> list[psutil.Process]:
    """The processes that a process started, once it has some."""
    end = time.monotonic() + timeout_s
    while not (children := main.children(recursive=True)):
        assert time.monotonic() < end, "the command started no process"
        time.sleep(0.1)
    return children
