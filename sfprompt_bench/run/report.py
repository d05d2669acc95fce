"""What a finished run leaves: a table for people, files for everything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from protocol.messages import Results, RoundStatus, RoundView
from protocol.traffic import Phase, total_bytes
from sfprompt_bench.plots import plot_accuracy, plot_bytes

_PURPOSE = {
    Phase.DOWNLOAD: "head, once",
    Phase.SMASHED: "smashed data",
    Phase.FEATURES: "features",
    Phase.GRADIENTS: "gradients, both ways",
    Phase.UPDATES: "prompts + tail, both ways",
    Phase.INFERENCE: "evaluation, both ways",
    Phase.CONTROL: "everything else",
}


def closed_rounds(results: Results) -> list[RoundView]:
    """The rounds that made a global state, in order."""
    return [view for view in results.rounds if view.status is RoundStatus.CLOSED]


def spent_epsilon(results: Results) -> float | None:
    """What all rounds have cost in privacy (``federation.dp_delta``); None without noise."""
    closed = closed_rounds(results)
    return closed[-1].epsilon if closed else None


def full_fine_tuning_bytes(results: Results) -> int:
    """What federated full fine-tuning sends in one round: the whole model, down and up, for every
    participant that this run sampled in its last round (2|W| each, float32, without headers)."""
    closed = closed_rounds(results)
    sampled = len(closed[-1].sampled) if closed else len(results.participants)
    return 2 * results.run.backbone_bytes * sampled


def summary(results: Results, seconds: float) -> dict[str, Any]:
    """The run in figures, for scripts."""
    closed = closed_rounds(results)
    sent = total_bytes(results.traffic)
    full = sum(2 * results.run.backbone_bytes * len(view.sampled) for view in closed)
    measured = [view.accuracy for view in closed if view.accuracy is not None]
    return {
        "run": results.run.id,
        "status": str(results.run.status),
        "rounds": len(closed),
        "accuracy": measured[-1] if measured else None,
        "best_accuracy": max(measured, default=None),
        "seconds": seconds,
        "epsilon": spent_epsilon(results),
        "bytes": results.traffic,
        "bytes_total": sent,
        "bytes_full_fine_tuning": full,
        "ratio_to_full_fine_tuning": sent / full if full else None,
    }


def result_table(results: Results, figures: dict[str, Any]) -> Table:
    """Bytes by phase and direction, accuracy, and the comparison."""
    table = Table(title=f"Run {results.run.settings.name}", title_justify="left")
    table.add_column("at the socket, all devices")
    for name in ("up MB", "down MB", "both MB", "share"):
        table.add_column(name, justify="right")
    total = figures["bytes_total"] or 1
    for phase, purpose in _PURPOSE.items():
        counts = results.traffic.get(phase)
        if counts:
            both = counts["up"] + counts["down"]
            table.add_row(
                purpose, *_megabytes(counts["up"], counts["down"], both), f"{both / total:.1%}"
            )
    table.add_section()
    up = sum(counts["up"] for counts in results.traffic.values())
    down = sum(counts["down"] for counts in results.traffic.values())
    table.add_row("in all", *_megabytes(up, down, up + down), "100%", style="bold")
    full = figures["bytes_full_fine_tuning"]
    ratio = figures["ratio_to_full_fine_tuning"]
    if full:
        half = full // 2
        table.add_row(
            "federated full fine-tuning would have sent",
            *_megabytes(half, half, full),
            f"[dim]{1 / ratio:.0%}[/dim]",
        )
    accuracy = figures["accuracy"]
    shown = "not measured" if accuracy is None else f"{accuracy:.2%}"
    table.caption = (
        f"accuracy on held-out images {shown} after {figures['rounds']} rounds, "
        f"{figures['seconds']:.0f} s"
    )
    if figures["epsilon"] is not None:
        delta = results.run.settings.federation.dp_delta
        table.caption += f", epsilon {figures['epsilon']:.2f} for delta {delta:g}"
    table.caption_justify = "left"
    return table


def write_files(results: Results, figures: dict[str, Any], folder: Path) -> list[Path]:
    """History (JSON lines), result (JSON) and plots. Returns what was written."""
    history = folder / "history.jsonl"
    history.write_text("".join(view.model_dump_json() + "\n" for view in results.rounds))
    result = folder / "result.json"
    settings = results.run.settings.model_dump(mode="json")
    result.write_text(json.dumps({**figures, "settings": settings}, indent=2) + "\n")
    closed = closed_rounds(results)
    title = results.run.settings.name
    per_round = full_fine_tuning_bytes(results)
    return [
        history,
        result,
        plot_accuracy(closed, title, folder / "accuracy.png"),
        plot_bytes(closed, per_round, title, folder / "bytes.png"),
    ]


def _megabytes(*counts: int) -> Sequence[str]:
    return [f"{count / 1e6:,.2f}" for count in counts]
