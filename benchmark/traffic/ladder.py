"""Runs every rung with every seed, several at a time, each a server and devices of its own."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmark.local_run import LocalRun
from benchmark.presets import Preset
from benchmark.report import write_files
from benchmark.traffic.rungs import Rung
from protocol.settings import RunSettings
from protocol.traffic import Phase

_FIGURES = "rung.json"


@dataclass(frozen=True)
class Climb:
    """What came of one rung: a value for each seed."""

    rung: Rung
    accuracy: tuple[float, ...]  # on the held-out images after the last round
    seconds: tuple[float, ...]  # of the whole run, over the simulated line
    bytes_total: tuple[int, ...]  # at the socket, all devices, both directions
    traffic: dict[str, dict[str, int]]  # by phase and direction, mean over the seeds

    @property
    def mean_accuracy(self) -> float:
        return statistics.fmean(self.accuracy)

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over the seeds; 0 for one."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else 0.0

    @property
    def mean_bytes(self) -> float:
        return statistics.fmean(self.bytes_total)


@dataclass(frozen=True)
class Setting:
    """What all rungs have in common.

    Attributes:
        preset: data and limits.
        devices: how many.
        seeds: a run for each.
        link: the simulated line of each device.
        at_once: runs at a time; each has one thread for its server.
    """

    preset: Preset
    devices: int
    seeds: tuple[int, ...]
    link: str
    at_once: int


def climb(rungs: Sequence[Rung], setting: Setting, folder: Path, console: Console) -> list[Climb]:
    """Every rung with every seed. A run whose result lies in ``folder`` is not run again.

    Raises:
        SFPromptError: a run failed.
    """
    jobs = [(rung, seed) for seed in setting.seeds for rung in rungs]
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
        ThreadPoolExecutor(setting.at_once) as workers,
    ):
        bar = progress.add_task("runs", total=len(jobs))

        def one(job: tuple[Rung, int]) -> dict[str, Any]:
            figures = _run(*job, setting, folder)
            progress.advance(bar)
            shown = f"{job[0].name}, seed {job[1]}: accuracy {figures['accuracy']:.1%}"
            progress.console.print(f"  {shown}, {figures['bytes_total'] / 1e6:,.1f} MB")
            return figures

        done = dict(zip(jobs, workers.map(one, jobs), strict=True))
    return [_climbed(rung, [done[rung, seed] for seed in setting.seeds]) for rung in rungs]


def _run(rung: Rung, seed: int, setting: Setting, folder: Path) -> dict[str, Any]:
    place = folder / f"{rung.name.replace(' ', '-')}-{seed}"
    settings = _seeded(rung.settings, seed, setting.devices)
    what = {
        "settings": settings.model_dump(mode="json"),
        "devices": setting.devices,
        "link": setting.link,
        "images": [setting.preset.limit_train, setting.preset.limit_test],
    }
    known = _known(place / _FIGURES, what)
    if known is not None:
        return known
    shutil.rmtree(place, ignore_errors=True)  # what an interrupted run has downloaded counts, too
    local = LocalRun(
        settings=settings,
        data=setting.preset.data,
        devices=setting.devices,
        partition="iid",
        folder=place,
        server_threads=1,
        limit_train=setting.preset.limit_train,
        limit_test=setting.preset.limit_test,
        link=setting.link,
    )
    results, figures = local.execute(Console(quiet=True))
    write_files(results, figures, place)
    (place / _FIGURES).write_text(json.dumps({"of": what, "figures": figures}, indent=2) + "\n")
    return figures


def _known(file: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of an earlier run of the very same setting."""
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    figures: dict[str, Any] = found["figures"]
    return figures if found["of"] == what else None


def _seeded(settings: RunSettings, seed: int, devices: int) -> RunSettings:
    federation = settings.federation.model_copy(update={"min_participants": devices})
    return settings.model_copy(update={"seed": seed, "federation": federation})


def _climbed(rung: Rung, figures: Iterable[dict[str, Any]]) -> Climb:
    every = list(figures)
    return Climb(
        rung=rung,
        accuracy=tuple(one["accuracy"] for one in every),
        seconds=tuple(one["seconds"] for one in every),
        bytes_total=tuple(one["bytes_total"] for one in every),
        traffic={
            str(phase): {way: _mean(every, phase, way) for way in ("up", "down")} for phase in Phase
        },
    )


def _mean(figures: Sequence[dict[str, Any]], phase: Phase, way: str) -> int:
    return round(statistics.fmean(one["bytes"].get(phase, {}).get(way, 0) for one in figures))
