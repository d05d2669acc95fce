"""Comparisons in experiment trackers: MLflow and TensorBoard, a run for each method and seed."""

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
    """Raise `NotFound` if the extra is not installed."""
    _check_installed("mlflow", "MLflow")


def check_tensorboard() -> None:
    """Raise `NotFound` if the extra is not installed."""
    _check_installed("tensorboard", "TensorBoard")


def _check_installed(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotFound(
            f"{name} is not installed",
            field=package,
            hint=f'install the extra, from a checkout: pip install ".[{package}]"',
        )


def log_mlflow(comparison: Comparison, outcomes: Sequence[Outcome], uri: str) -> None:
    """Log figures, and accuracy and bytes of one device by rounds, to a tracking server or store.

    Raises:
        NotFound: the extra is not installed.
    """
    check_mlflow()
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(comparison.name)
    shared = {name: getattr(comparison, name) for name in _SHARED}
    for outcome in outcomes:
        for seed, figures in zip(outcome.seeds, outcome.figures, strict=True):
            with mlflow.start_run(run_name=f"{outcome.name}, seed {seed}"):
                mlflow.log_params(shared | {"method": outcome.method, "seed": seed} | outcome.point)
                values = {name: figures.get(name) for name in FIELDS}
                mlflow.log_metrics(
                    {name: float(value) for name, value in values.items() if value is not None}
                )
                for point in figures["curve"]:
                    if point["accuracy"] is not None:
                        metrics = {
                            "curve_accuracy": point["accuracy"],
                            "curve_bytes": float(point["bytes"]),
                        }
                        mlflow.log_metrics(metrics, step=point["round"])


def log_tensorboard(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Log figures, and accuracy over rounds and over kB of one device, under ``folder``.

    Raises:
        NotFound: the extra is not installed.
    """
    check_tensorboard()
    writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    for outcome in outcomes:
        for seed, figures in zip(outcome.seeds, outcome.figures, strict=True):
            run = re.sub(r"[^A-Za-z0-9._=-]+", "_", f"{outcome.name}-{seed}")
            with writer_class(str(folder / run)) as writer:
                for point in figures["curve"]:
                    if point["accuracy"] is not None:
                        kilobytes = point["bytes"] // 1000
                        writer.add_scalar("accuracy/rounds", point["accuracy"], point["round"])
                        writer.add_scalar("accuracy/kilobytes", point["accuracy"], kilobytes)
                for name in FIELDS:
                    if figures.get(name) is not None:
                        writer.add_scalar(f"figures/{name}", figures[name])
