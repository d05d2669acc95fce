"""The figures of a finished run. Bytes are of one device unless a name says otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select

from protocol.errors import InvalidField
from protocol.messages import BytesByPhase, Results
from protocol.plan import RunPlan
from protocol.traffic import Phase, total_bytes
from sfprompt_bench.compare.tasks import Figures
from sfprompt_bench.compare.usage import Usage
from sfprompt_bench.cost.method_cost import Question
from sfprompt_bench.methods.base import FederatedMethod, ReferenceResult
from sfprompt_bench.run.report import closed_rounds, spent_epsilon
from split_server.storage.database import EvaluationRow, ParticipantRow, RoundRow, Store
from tuning_methods.proxies.settings import distillation_of

# A round of training; other phases are the start, evaluation and control.
_TRAINING = (Phase.SMASHED, Phase.FEATURES, Phase.GRADIENTS, Phase.UPDATES)

# Figures that a reference does not have: it moves nothing and has no devices.
_FEDERATED_ONLY = (
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


def run_figures(
    results: Results,
    *,
    seconds: float,
    trainable_parameters: int,
    devices: Sequence[Usage],
    server: Usage,
    by_device: Mapping[str, float],
) -> Figures:
    """Collect a run's figures, measured at the socket and on the processes.

    Bytes to start are the head and the first global state (its file; its headers count in the
    first round). Bytes of a round are the mean over the rounds, so that they include a share of
    what crosses once in the run, and of heads after the first. Process times are processor time.

    Args:
        results: of the run.
        seconds: of the whole run, by the clock.
        trainable_parameters: numbers in the global state.
        devices, server: what the processes used.
        by_device: accuracy on each device's held-out samples.
    """
    count = len(results.participants) or 1
    closed = closed_rounds(results)
    head_bytes = sum(results.traffic.get(Phase.DOWNLOAD, {}).values())
    plan = results.run.plan
    distillation, rounds = distillation_of(plan), plan.federation.rounds
    heads = 1 + sum(distillation.is_due(view.round, rounds) for view in closed)
    first_head_bytes = head_bytes / heads
    state = results.run.state.nbytes  # a file of float32, as large as before the first round
    up, down = (_training_bytes(results.traffic, direction) for direction in ("up", "down"))
    down_after_start = max(0, down - count * state) + head_bytes - first_head_bytes
    sampled = sum(len(view.sampled) for view in closed) or 1
    accuracies = [view.accuracy for view in closed if view.accuracy is not None]
    all_bytes = total_bytes(results.traffic)
    return {
        "accuracy": results.best.accuracy if results.best else None,
        "best_accuracy": max(accuracies, default=None),
        "accuracy_clients": dict(by_device),
        "accuracy_worst_client": min(by_device.values(), default=None),
        "trainable_parameters": trainable_parameters,
        "bytes_start": round(first_head_bytes / count) + state,
        "bytes_up_per_round": round(up / sampled),
        "bytes_down_per_round": round(down_after_start / sampled),
        "bytes_total": round(all_bytes / count),
        "bytes_all_devices": all_bytes,
        "bytes": {
            phase: {direction: round(nbytes / count) for direction, nbytes in counts.items()}
            for phase, counts in results.traffic.items()
        },
        "device_peak_bytes": max((usage.peak_bytes for usage in devices), default=None),
        "device_seconds": _mean([usage.cpu_seconds for usage in devices]),
        "server_peak_bytes": server.peak_bytes or None,
        "server_seconds": server.cpu_seconds or None,
        "seconds": seconds,
        "epsilon": spent_epsilon(results),
        "curve": _curve(results, count),
    }


def calculated(method: FederatedMethod, plan: RunPlan, results: Results) -> Figures:
    """Calculate the cost of a run for its mean device.

    A device's operations cannot be measured; torch's counter on the meta device stands for them.
    """
    participants = results.participants
    train = statistics.fmean(participant.train_samples for participant in participants)
    test = statistics.fmean(participant.test_samples for participant in participants)
    question = Question(
        plan,
        max(1, round(train)),
        round(test),
        local_epochs=max(1, plan.training.local_epochs),
    )
    try:
        cost = method.cost(question)
    except InvalidField:  # the size of a codec's payload depends on the values
        return dict.fromkeys(("device_flops_per_round", "device_flops_total", "calculated"))
    rounds = plan.federation.rounds
    # A round may sample some of the devices: the mean device trains in fewer rounds then.
    trained = round(sum(len(view.sampled) for view in results.rounds) / len(participants))
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


def reference_figures(result: ReferenceResult, seconds: float) -> Figures:
    """Collect the figures of a reference, with None for those that it does not have."""
    return {
        **dict.fromkeys(_FEDERATED_ONLY),
        "accuracy": result.accuracy,
        "best_accuracy": result.accuracy,
        "accuracy_clients": {},
        "trainable_parameters": result.trainable_parameters,
        "chosen": dict(result.chosen),
        "bytes": {},
        "seconds": seconds,
        "curve": [],
    }


def device_accuracies(data_dir: Path, run_id: str) -> dict[str, float]:
    """Read the accuracy of the run's state on each device's samples, by device name.

    Devices without held-out samples, or without a response in that round, are left out.
    """
    store = Store(data_dir / "server.sqlite")
    try:
        with store.reading() as session:
            newest = session.execute(
                select(RoundRow.round, RoundRow.attempt)
                .where(RoundRow.run_id == run_id, RoundRow.accuracy.is_not(None), RoundRow.kept)
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


def _training_bytes(traffic: BytesByPhase, direction: str) -> int:
    return sum(traffic.get(phase, {}).get(direction, 0) for phase in _TRAINING)


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
