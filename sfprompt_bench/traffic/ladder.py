"""Runs of the ladder: each rung with each seed, several at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from protocol.settings import RunSettings
from protocol.traffic import Phase
from sfprompt_bench.compare.tasks import Figures, Task, perform_all
from sfprompt_bench.presets import Preset
from sfprompt_bench.run.local_run import LocalRun
from sfprompt_bench.run.report import write_files
from sfprompt_bench.traffic.rungs import Rung

_FIGURES = "rung.json"


@dataclass(frozen=True)
class RungResult:
    """The result of one rung: a value for each seed."""

    rung: Rung
    accuracy: tuple[float, ...]  # on the held-out images after the last round
    seconds: tuple[float, ...]  # of the whole run, over the simulated network
    bytes_total: tuple[int, ...]  # at the socket, all devices, both directions
    traffic: dict[str, dict[str, int]]  # by phase and direction, mean over the seeds

    @property
    def mean_accuracy(self) -> float:
        return statistics.fmean(self.accuracy)

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over the seeds; 0 for a single seed."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else 0.0

    @property
    def mean_bytes(self) -> float:
        return statistics.fmean(self.bytes_total)


@dataclass(frozen=True)
class LadderSetting:
    """The settings that all rungs share.

    Attributes:
        preset: data and limits.
        devices: number of devices.
        seeds: one run for each.
        link: simulated network of each device.
        at_once: runs at the same time; the server of each has one thread.
        dtype: of the bodies' computation.
    """

    preset: Preset
    devices: int
    seeds: tuple[int, ...]
    link: str
    at_once: int
    dtype: str = "auto"


def run_ladder(
    rungs: Sequence[Rung], setting: LadderSetting, folder: Path, console: Console
) -> list[RungResult]:
    """Run each rung with each seed, except runs with a result in ``folder``.

    Raises:
        SFPromptError: a run failed.
    """
    jobs = [(rung, seed) for seed in setting.seeds for rung in rungs]
    tasks = [_task(rung, seed, setting, folder) for rung, seed in jobs]
    job_of = {task.name: job for task, job in zip(tasks, jobs, strict=True)}

    def perform(task: Task) -> Figures:
        return _run(*job_of[task.name], setting, task.folder)

    results = perform_all(
        tasks,
        perform,
        file=_FIGURES,
        at_once=setting.at_once,
        console=console,
        describe=_describe,
    )
    figures: dict[tuple[Rung, int], Figures] = {}
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, Exception):
            raise result
        figures[job] = result
    return [_result(rung, [figures[rung, seed] for seed in setting.seeds]) for rung in rungs]


def _task(rung: Rung, seed: int, setting: LadderSetting, folder: Path) -> Task:
    settings = _settings(rung, seed, setting)
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "devices": setting.devices,
        "link": setting.link,
        "dtype": setting.dtype,
        "images": [setting.preset.limit_train, setting.preset.limit_test],
    }
    task_folder = folder / f"{rung.name.replace(' ', '-')}-{seed}"
    return Task(f"{rung.name}, seed {seed}", task_folder, inputs)


def _describe(task: Task, figures: Figures) -> str:
    accuracy, nbytes = figures["accuracy"], figures["bytes_total"]
    return f"{task.name}: accuracy {accuracy:.1%}, {nbytes / 1e6:,.1f} MB"


def _run(rung: Rung, seed: int, setting: LadderSetting, folder: Path) -> Figures:
    run = LocalRun(
        settings=_settings(rung, seed, setting),
        data=setting.preset.data,
        devices=setting.devices,
        partition="iid",
        folder=folder,
        server_threads=1,
        dtype=setting.dtype,
        limit_train=setting.preset.limit_train,
        limit_test=setting.preset.limit_test,
        link=setting.link,
    )
    results, figures = run.execute(Console(quiet=True))
    write_files(results, figures, folder)
    return figures


def _settings(rung: Rung, seed: int, setting: LadderSetting) -> RunSettings:
    devices = {"min_participants": setting.devices}
    federation = rung.settings.federation.model_copy(update=devices)
    return rung.settings.model_copy(update={"seed": seed, "federation": federation})


def _result(rung: Rung, by_seed: Sequence[Figures]) -> RungResult:
    return RungResult(
        rung=rung,
        accuracy=tuple(figures["accuracy"] for figures in by_seed),
        seconds=tuple(figures["seconds"] for figures in by_seed),
        bytes_total=tuple(figures["bytes_total"] for figures in by_seed),
        traffic={
            str(phase): {
                direction: _mean_bytes(by_seed, phase, direction) for direction in ("up", "down")
            }
            for phase in Phase
        },
    )


def _mean_bytes(by_seed: Sequence[Figures], phase: Phase, direction: str) -> int:
    return round(
        statistics.fmean(figures["bytes"].get(phase, {}).get(direction, 0) for figures in by_seed)
    )
