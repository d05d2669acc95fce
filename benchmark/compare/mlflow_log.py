"""A comparison for MLflow: an experiment, with a run for each method and seed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from benchmark.compare.comparison import Comparison
from benchmark.compare.outcome import FIELDS, Outcome
from protocol.errors import NotFound

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
