"""The report of a finished run: a table, JSON files and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from protocol.messages import Results, RoundStatus, RoundView
from protocol.traffic import Phase, total_bytes
from sfprompt_bench.plots import draw_accuracy, draw_bytes, save

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
    """The rounds with a new global state, in order."""
    return [view for view in results.rounds if view.status is RoundStatus.CLOSED]


def spent_epsilon(results: Results) -> float | None:
    """The privacy spent in all rounds for ``federation.dp_delta``; None without noise."""
    closed = closed_rounds(results)
    return closed[-1].epsilon if closed else None


def full_fine_tuning_bytes(results: Results) -> int:
    """Bytes of a round of federated full fine-tuning with the last round's participants.

    The whole model goes down and up for each of them: 2|W|, float32, without headers.
    """
    closed = closed_rounds(results)
    sampled = len(closed[-1].sampled) if closed else len(results.participants)
    return 2 * results.run.backbone_bytes * sampled


def summary(results: Results, seconds: float) -> dict[str, Any]:
    """Collect the figures of a run as JSON values."""
    closed = closed_rounds(results)
    nbytes = total_bytes(results.traffic)
    full = sum(2 * results.run.backbone_bytes * len(view.sampled) for view in closed)
    accuracies = [view.accuracy for view in closed if view.accuracy is not None]
    return {
        "run": results.run.id,
        "status": str(results.run.status),
        "rounds": len(closed),
        "accuracy": results.best.accuracy if results.best else None,
        "best_accuracy": max(accuracies, default=None),
        "seconds": seconds,
        "epsilon": spent_epsilon(results),
        "bytes": results.traffic,
        "bytes_total": nbytes,
        "bytes_full_fine_tuning": full,
        "ratio_to_full_fine_tuning": nbytes / full if full else None,
    }


def result_table(results: Results, figures: dict[str, Any]) -> Table:
    """Show bytes by phase and direction, accuracy, and federated full fine-tuning's bytes."""
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
    reached = "not measured" if accuracy is None else f"{accuracy:.2%}"
    table.caption = (
        f"accuracy on held-out images {reached} after {figures['rounds']} rounds, "
        f"{figures['seconds']:.0f} s"
    )
    if figures["epsilon"] is not None:
        delta = results.run.settings.federation.dp_delta
        table.caption += f", epsilon {figures['epsilon']:.2f} for delta {delta:g}"
    table.caption_justify = "left"
    return table


def write_files(results: Results, figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write history (JSON lines), result (JSON) and plots; return the files."""
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
        save(draw_accuracy(closed, title), folder / "accuracy.png"),
        save(draw_bytes(closed, per_round, title), folder / "bytes.png"),
    ]


def _megabytes(*counts: int) -> Sequence[str]:
    return [f"{count / 1e6:,.2f}" for count in counts]
