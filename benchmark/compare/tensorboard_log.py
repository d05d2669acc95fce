"""A comparison for TensorBoard: a run for each method and seed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from benchmark.compare.outcome import FIELDS, Outcome
from protocol.errors import NotFound


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
