"""What a finished run comes to, as numbers. Bytes are of one device unless it says otherwise."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from sqlalchemy import select

from protocol.errors import InvalidField
from protocol.messages import BytesByPhase, Results
from protocol.plan import RunPlan
from protocol.traffic import Phase, total_bytes
from sfprompt_bench.compare.tasks import Figures
from sfprompt_bench.estimate import METHODS, MethodCost, Question
from sfprompt_bench.run.report import closed_rounds, spent_epsilon
from split_server.storage.database import EvaluationRow, ParticipantRow, RoundRow, Store

_EVERY_S = 0.2

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


@dataclass
class Usage:
    """Of one process, so far."""

    peak_bytes: int = 0  # of resident memory, libraries included
    cpu_seconds: float = 0.0  # user and system


class UsageWatch:
    """Watches the server and the devices of one run, children of this process, while it is open.

    They are known by the run's folder, which every one of them is told.

    The last look at a process is at most `_EVERY_S` before its end. On Linux the peak of memory
    is the kernel's; elsewhere it is the largest that was seen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._seen: dict[str, Usage] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> UsageWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def server(self) -> Usage:
        return self._seen.get("server", Usage())

    def devices(self) -> list[Usage]:
        return [usage for name, usage in sorted(self._seen.items()) if name != "server"]

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(_EVERY_S):
            for child in own.children():
                with contextlib.suppress(psutil.Error, OSError):
                    self._look(child)

    def _look(self, child: psutil.Process) -> None:
        command = child.cmdline()
        name = _name(command)
        if name is None or not any(word.startswith(f"{self._folder}{os.sep}") for word in command):
            return
        usage = self._seen.setdefault(name, Usage())
        usage.peak_bytes = max(usage.peak_bytes, _peak_bytes(child))
        times = child.cpu_times()
        usage.cpu_seconds = max(usage.cpu_seconds, times.user + times.system)


def _name(command: list[str]) -> str | None:
    """``server``, or the name of a device; None for a process that is neither."""
    if "split_server.cli" in command:
        return "server"
    if "edge_client.cli" in command and "--name" in command[:-1]:
        return command[command.index("--name") + 1]
    return None


def _peak_bytes(child: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        found = _PEAK.search(Path(f"/proc/{child.pid}/status").read_text())
        if found:
            return int(found.group(1)) * 1024
    return int(child.memory_info().rss)


# Of a round of training; the rest is the start, evaluation, and asking what to do next.
_TRAINING = (Phase.SMASHED, Phase.FEATURES, Phase.GRADIENTS, Phase.UPDATES)


def run_figures(
    results: Results,
    *,
    seconds: float,
    trainable_parameters: int,
    devices: Sequence[Usage],
    server: Usage,
    by_device: Mapping[str, float],
) -> Figures:
    """Measured at the socket and on the processes.

    Bytes to start are the head, and the first global state (its file; its headers count in the
    first round). Bytes of a round are the mean over the rounds, so that what crosses once in the
    run, or a head that comes anew, is spread over them. Times of processes are processor time.
    """
    count = len(results.participants) or 1
    closed = closed_rounds(results)
    heads = sum(results.traffic.get(Phase.DOWNLOAD, {}).values())
    how, rounds = results.run.settings.plan.distillation, results.run.settings.federation.rounds
    first = heads / (1 + sum(how.due(view.round, rounds) for view in closed))
    state = results.run.state.nbytes  # of float32 in a file: as large before the first round
    up, down = (_training_bytes(results.traffic, way) for way in ("up", "down"))
    sampled = sum(len(view.sampled) for view in closed) or 1
    measured = [view.accuracy for view in closed if view.accuracy is not None]
    everything = total_bytes(results.traffic)
    return {
        "accuracy": measured[-1] if measured else None,
        "best_accuracy": max(measured, default=None),
        "accuracy_clients": dict(by_device),
        "accuracy_worst_client": min(by_device.values(), default=None),
        "trainable_parameters": trainable_parameters,
        "bytes_start": round(first / count) + state,
        "bytes_up_per_round": round(up / sampled),
        "bytes_down_per_round": round((max(0, down - count * state) + heads - first) / sampled),
        "bytes_total": round(everything / count),
        "bytes_all_devices": everything,
        "bytes": {
            phase: {way: round(number / count) for way, number in counts.items()}
            for phase, counts in results.traffic.items()
        },
        "device_peak_bytes": max((one.peak_bytes for one in devices), default=None),
        "device_seconds": _mean([one.cpu_seconds for one in devices]),
        "server_peak_bytes": server.peak_bytes or None,
        "server_seconds": server.cpu_seconds or None,
        "seconds": seconds,
        "epsilon": spent_epsilon(results),
        "curve": _curve(results, count),
    }


def calculated(costed_as: str | None, settings: RunPlan, results: Results) -> Figures:
    """What `sfprompt_bench.estimate` says of the same run, for the mean device of it.

    Operations have no meter on a device; torch's counter on the meta device is the measurement.
    """
    unknown = {"device_flops_per_round": None, "device_flops_total": None, "calculated": None}
    if costed_as is None:
        return unknown
    members = results.participants
    train = statistics.fmean(member.train_samples for member in members)
    test = statistics.fmean(member.test_samples for member in members)
    question = Question(
        settings,
        max(1, round(train)),
        round(test),
        local_epochs=max(1, settings.training.local_epochs),
    )
    try:
        cost: MethodCost = METHODS[costed_as].cost(question)
    except InvalidField:  # the size of a codec's payload that depends on the values
        return unknown
    rounds, asked = settings.federation.rounds, sum(len(one.sampled) for one in results.rounds)
    trained = round(asked / len(members))  # by the mean device, where each round draws some
    totals = {
        "rounds_trained": trained,
        "bytes_total": cost.bytes_total(rounds, trained),
        "bytes_renewed": cost.bytes_renewed(rounds),
        "flops_total": cost.flops_total(trained),
    }
    return {
        "device_flops_per_round": cost.device_flops_per_round,
        "device_flops_total": cost.flops_total(trained),
        "calculated": asdict(cost) | totals,
    }


def reference_figures(accuracy: float, trainable_parameters: int, seconds: float) -> Figures:
    """Of a method that moves nothing and has no devices."""
    nothing = dict.fromkeys(
        (
            "accuracy_worst_client",
            "bytes_start",
            "bytes_up_per_round",
            "bytes_down_per_round",
            "bytes_total",
            "bytes_all_devices",
            "device_flops_per_round",
            "device_flops_total",
            "device_peak_bytes",
            "device_seconds",
            "server_peak_bytes",
            "server_seconds",
            "calculated",
            "epsilon",
        )
    )
    return {
        **nothing,
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "accuracy_clients": {},
        "trainable_parameters": trainable_parameters,
        "bytes": {},
        "seconds": seconds,
        "curve": [],
    }


def _training_bytes(traffic: BytesByPhase, way: str) -> int:
    return sum(traffic.get(phase, {}).get(way, 0) for phase in _TRAINING)


def _curve(results: Results, devices: int) -> list[dict[str, Any]]:
    """Round by round: bytes of one device so far, start included, and the accuracy."""
    points, moved = [], 0
    closed = {(view.round, view.attempt) for view in closed_rounds(results)}
    for view in results.rounds:
        moved += total_bytes(view.traffic)
        if (view.round, view.attempt) in closed:
            points.append(
                {
                    "round": view.round,
                    "bytes": round(moved / devices),
                    "accuracy": view.accuracy,
                    "train_loss": view.train_loss,
                    "local_loss": view.local_loss,
                }
            )
    return points


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def device_accuracies(data_dir: Path, run_id: str) -> dict[str, float]:
    """The newest measured global state's accuracy on each device's samples, by device name.

    Devices without held-out samples, or which did not answer in that round, are left out.
    """
    store = Store(data_dir / "server.sqlite")
    try:
        with store.reading() as session:
            newest = session.execute(
                select(RoundRow.round, RoundRow.attempt)
                .where(RoundRow.run_id == run_id, RoundRow.accuracy.is_not(None))
                .order_by(RoundRow.round.desc(), RoundRow.attempt.desc())
                .limit(1)
            ).first()
            if newest is None:
                return {}
            rows = session.execute(
                select(ParticipantRow.name, EvaluationRow.correct, EvaluationRow.samples)
                .join(
                    ParticipantRow,
                    (ParticipantRow.run_id == EvaluationRow.run_id)
                    & (ParticipantRow.id == EvaluationRow.participant_id),
                )
                .where(
                    EvaluationRow.run_id == run_id,
                    EvaluationRow.round == newest.round,
                    EvaluationRow.attempt == newest.attempt,
                )
                .order_by(ParticipantRow.name)
            ).all()
    finally:
        store.close()
    return {name: correct / samples for name, correct, samples in rows if samples}
