"""What a finished run comes to, as numbers. Bytes are of one device unless it says otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmark.compare.tasks import Figures
from benchmark.compare.usage import Usage
from benchmark.estimate import METHODS, MethodCost, Question
from benchmark.report import closed_rounds, spent_epsilon
from protocol.errors import InvalidField
from protocol.messages import BytesByPhase, Results
from protocol.settings import RunSettings
from protocol.traffic import Phase, total_bytes

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
    how, rounds = results.run.settings.distillation, results.run.settings.federation.rounds
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


def calculated(costed_as: str | None, settings: RunSettings, results: Results) -> Figures:
    """What `benchmark.estimate` says of the same run, for the mean device of it.

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
