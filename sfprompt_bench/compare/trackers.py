"""A comparison for MLflow: an experiment, with a run for each method and seed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import NotFound
from sfprompt_bench.compare.config import Comparison
from sfprompt_bench.compare.results import FIELDS, Outcome

_SHARED = ("data", "devices", "partition", "rounds", "limit_train", "limit_test", "shots", "link")


def check_mlflow() -> None:
    """Raises `NotFound` if the extra is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise NotFound(
            "MLflow is not installed",
            field="mlflow",
            hint='install the extra, from a checkout: pip install ".[mlflow]"',
        )


def log_mlflow(comparison: Comparison, outcomes: Sequence[Outcome], uri: str) -> None:
    """Figures, and accuracy and bytes of one device by rounds, to the tracking server or store."""
    check_mlflow()
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(comparison.name)
    for outcome in outcomes:
        for seed, figures in zip(outcome.seeds, outcome.figures, strict=True):
            with mlflow.start_run(run_name=f"{outcome.name}, seed {seed}"):
                shared = {name: getattr(comparison, name) for name in _SHARED}
                mlflow.log_params(shared | {"method": outcome.method, "seed": seed} | outcome.point)
                found = {name: figures.get(name) for name in FIELDS}
                mlflow.log_metrics(
                    {name: float(value) for name, value in found.items() if value is not None}
                )
                for point in figures["curve"]:
                    if point["accuracy"] is not None:
                        at_round = {"curve_accuracy": point["accuracy"]}
                        at_round["curve_bytes"] = float(point["bytes"])
                        mlflow.log_metrics(at_round, step=point["round"])


def check_tensorboard() -> None:
    """Raises `NotFound` if the extra is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise NotFound(
            "TensorBoard is not installed",
            field="tensorboard",
            hint='install the extra, from a checkout: pip install ".[tensorboard]"',
        )


def log_tensorboard(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Accuracy over rounds and over kB of one device, and all figures, under ``folder``."""
    check_tensorboard()
    writer_of = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    for outcome in outcomes:
        for seed, figures in zip(outcome.seeds, outcome.figures, strict=True):
            place = re.sub(r"[^A-Za-z0-9._=-]+", "_", f"{outcome.name}-{seed}")
            with writer_of(str(folder / place)) as writer:
                for point in figures["curve"]:
                    if point["accuracy"] is not None:
                        writer.add_scalar("accuracy/rounds", point["accuracy"], point["round"])
                        kilobytes = point["bytes"] // 1000
                        writer.add_scalar("accuracy/kilobytes", point["accuracy"], kilobytes)
                for name in FIELDS:
                    if figures.get(name) is not None:
                        writer.add_scalar(f"figures/{name}", figures[name])
