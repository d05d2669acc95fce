"""Is federated tuning as accurate as tuning on one heap of data? Runs and references together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.centralised import Centralised
from benchmark.local_run import LocalRun
from benchmark.presets import Preset
from benchmark.report import write_files
from edge_client.data import limit_per_set, load_dataset
from protocol.settings import RunSettings


@dataclass(frozen=True)
class Measured:
    """One way of tuning and what came of it."""

    name: str
    accuracy: float  # on the held-out images, a share of 1
    megabytes: float | None = None  # at the socket, all devices, both directions


def measure(
    preset: Preset,
    settings: RunSettings,
    devices: int,
    partitions: list[str],
    folder: Path,
    console: Console,
) -> list[Measured]:
    """A linear probe, centralised tuning, and one federated run for every partition."""
    rows = _references(preset, settings, console)
    for partition in partitions:
        console.print(f"{devices} devices, {partition}")
        place = folder / partition.replace(":", "-")
        local = LocalRun(
            settings=settings,
            data=preset.data,
            devices=devices,
            partition=partition,
            folder=place,
            limit_train=preset.limit_train,
            limit_test=preset.limit_test,
        )
        results, figures = local.execute(console)
        write_files(results, figures, place)
        rows.append(
            Measured(
                f"SFPrompt, {devices} devices, {partition}",
                figures["accuracy"],
                figures["bytes_total"] / 1e6,
            )
        )
    return rows


def _references(preset: Preset, settings: RunSettings, console: Console) -> list[Measured]:
    data = limit_per_set(
        load_dataset(preset.data, class_names=settings.class_names),
        train=preset.limit_train,
        test=preset.limit_test,
        seed=settings.seed,
    )
    reference = Centralised(settings, data)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("linear probe", total=None)
        probed = reference.probe()
        progress.update(bar, description="centralised tuning")
        tuned = reference.tune(
            lambda done, total: progress.update(bar, completed=done, total=total)
        )
    return [
        Measured("linear probe on frozen features", probed),
        Measured("centralised tuning of the same prompts and tail", tuned),
    ]


def accuracy_table(rows: list[Measured]) -> Table:
    """The measured ways under each other."""
    table = Table(title="Accuracy on held-out images", title_justify="left")
    table.add_column("method")
    table.add_column("accuracy", justify="right")
    table.add_column("MB at the socket", justify="right")
    for row in rows:
        moved = "-" if row.megabytes is None else f"{row.megabytes:,.0f}"
        table.add_row(row.name, f"{row.accuracy:.1%}", moved)
    return table
