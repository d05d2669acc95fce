"""After the fuzzing: a real device takes part in a run on the same server, to its end."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from protocol.errors import SFPromptError
from protocol.federation import FederationSettings
from protocol.plan import ModelPlan, RunPlan, TrainingPlan
from sfprompt_bench.fuzz.findings import Report
from sfprompt_bench.fuzz.target import Target
from sfprompt_bench.run.processes import Process
from split_server.client import OperatorClient
from tuning_methods.custom.settings import Custom

_TIMEOUT_S: Final = 120.0

_IMAGES: Final = 60

_KIND_LENGTH: Final = 60  # of an error's line: logger and the beginning of its message

_PLAN: Final = RunPlan(
    name="afterwards",
    model=ModelPlan(backbone="test_vit", weights="random:0", image_size=32, cut=1, prompt_count=2),
    federation=FederationSettings(rounds=1),
    training=TrainingPlan(batch_size=16),
)


def create_run(target: Target) -> str:
    """Create a run for one device."""
    operator = OperatorClient(target.url, target.operator_token)
    try:
        return operator.create_run(Custom.of(_PLAN)).id
    finally:
        operator.close()


def device_arguments(target: Target, run: str, home: Path) -> list[str]:
    """Return the arguments of ``edge-client`` for this run."""
    arguments = ["join", target.url, "--run", run, "--data", "digits", "--threads", "1"]
    arguments += ["--limit-train", str(_IMAGES), "--limit-test", str(_IMAGES)]
    return [*arguments, "--home", str(home), "--name", "afterwards", "--patience", "30"]


def finish_run(target: Target, folder: Path, report: Report) -> None:
    """Run a device to the end of a run; anything else is a finding."""
    try:
        run = create_run(target)
    except SFPromptError as error:
        report.add(0, "a run after all requests", f"it could not be created: {error}")
        return
    arguments = ["edge_client.cli", *device_arguments(target, run, folder / "device")]
    device = Process("device", arguments, folder, threads=1)
    try:
        code: int | None = device.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        device.stop()
    check_finished(code, report)


def check_log(log: Path, report: Report) -> None:
    """Note each kind of error in a server's log: no request may cause one."""
    kinds: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines():
        parts = line.split(maxsplit=4)  # date, time, level, request, logger and message
        if len(parts) == 5 and parts[2] in ("ERROR", "CRITICAL"):
            kinds.setdefault(parts[4][:_KIND_LENGTH], line[:200])
    for line in kinds.values():
        report.add(0, f"the log {log}", line)


def check_finished(code: int | None, report: Report) -> None:
    """Note how the device has ended."""
    if code == 0:
        report.notes.append("afterwards a device finished a run")
    else:
        report.add(0, "a run after all requests", f"the device ended with {code}")
