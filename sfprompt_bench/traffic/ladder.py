"""Runs every rung with every seed, several at a time, each a server and devices of its own."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from protocol.plan import RunPlan
from protocol.traffic import Phase
from sfprompt_bench.compare.tasks import Figures, Task, perform_all
from sfprompt_bench.methods.base import Changes, with_changes
from sfprompt_bench.presets import Preset
from sfprompt_bench.run.local_run import LocalRun
from sfprompt_bench.run.report import write_files


@dataclass(frozen=True)
class Rung:
    """One measure, on top of those before it.

    Attributes:
        name: short, for tables and plots.
        what: what it does, in a sentence.
        settings: of the whole run on this rung.
    """

    name: str
    what: str
    settings: RunPlan


def ladder(paper: RunPlan, default: RunPlan) -> list[Rung]:
    """The rungs from the paper-faithful form of a run to its default form.

    The first and the last are these two, untouched. A measure that changes nothing between them
    has no rung.
    """
    rungs = [Rung("paper", "the paper's form: four tensors a step, all tokens, float32", paper)]
    for name, what, changes in _measures(default):
        settings = with_changes(rungs[-1].settings, changes)
        if settings != rungs[-1].settings:
            rungs.append(Rung(name, what, settings))
    rungs[-1] = replace(rungs[-1], what=f"{rungs[-1].what}: the default form")
    return rungs


def _measures(default: RunPlan) -> Iterator[tuple[str, str, Changes]]:
    """Name, description and change of each, in the order in which they are taken up.

    The recipe of training goes with the place of the prompts that it was found for, but for the
    share of samples that it keeps.
    """
    wire, training, last = default.wire, default.training, default.model_dump()
    half = dict.fromkeys(("smashed", "features", "gradients"), "bfloat16")
    yield "bfloat16", "what crosses in a step in bfloat16", {"wire": half}
    yield (
        "lean features",
        "features only as far as the tail reads them",
        {"wire": {"pooled_features": wire.pooled_features}},
    )
    all_samples = {"keep_fraction": 1.0}
    yield (
        "at the cut",
        f"{default.model.prompt_depth} prompts in the body, tuned there, with their own recipe; "
        "all samples, whose smashed data cross in every round",
        {"model": last["model"], "training": last["training"] | all_samples},
    )
    yield (
        "kept",
        "a sample's smashed data sent once and kept by the server",
        {"wire": {"keep_smashed": wire.keep_smashed}},
    )
    yield (
        "coded smashed",
        f"smashed data in {wire.smashed}",
        {"wire": {"smashed": wire.smashed}},
    )
    steps = ("features", "gradients", "stochastic_rounding", "inference")
    yield (
        "coded steps",
        f"features in {wire.features}, gradients in {wire.gradients}",
        {"wire": {name: last["wire"][name] for name in steps}},
    )
    yield (
        "coded states",
        f"head in {wire.head}, updates in {wire.updates} as changes of the state",
        {"wire": last["wire"]},
    )
    yield (
        "fewer samples",
        f"in each round {training.keep_fraction:.0%} of the samples, pruned by {training.pruning}",
        {"training": last["training"]},
    )


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
        dtype: what the bodies compute in.
    """

    preset: Preset
    devices: int
    seeds: tuple[int, ...]
    link: str
    at_once: int
    dtype: str = "auto"


def climb(rungs: Sequence[Rung], setting: Setting, folder: Path, console: Console) -> list[Climb]:
    """Every rung with every seed. A run whose result lies in ``folder`` is not run again.

    Raises:
        SFPromptError: a run failed.
    """
    jobs = [(rung, seed) for seed in setting.seeds for rung in rungs]
    tasks = [_task(rung, seed, setting, folder) for rung, seed in jobs]
    of_task = {task.name: job for task, job in zip(tasks, jobs, strict=True)}

    def perform(task: Task) -> Figures:
        return _run(*of_task[task.name], setting, task.folder)

    outcomes = perform_all(
        tasks, perform, file=_FIGURES, at_once=setting.at_once, console=console, describe=_line
    )
    done: dict[tuple[Rung, int], Figures] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise outcome
        done[job] = outcome
    return [_climbed(rung, [done[rung, seed] for seed in setting.seeds]) for rung in rungs]


def _task(rung: Rung, seed: int, setting: Setting, folder: Path) -> Task:
    settings = _seeded(rung.settings, seed, setting.devices)
    what = {
        "settings": settings.model_dump(mode="json"),
        "devices": setting.devices,
        "link": setting.link,
        "dtype": setting.dtype,
        "images": [setting.preset.limit_train, setting.preset.limit_test],
    }
    place = folder / f"{rung.name.replace(' ', '-')}-{seed}"
    return Task(f"{rung.name}, seed {seed}", place, what)


def _line(task: Task, figures: Figures) -> str:
    accuracy, moved = figures["accuracy"], figures["bytes_total"]
    return f"{task.name}: accuracy {accuracy:.1%}, {moved / 1e6:,.1f} MB"


def _run(rung: Rung, seed: int, setting: Setting, place: Path) -> Figures:
    local = LocalRun(
        settings=_seeded(rung.settings, seed, setting.devices),
        data=setting.preset.data,
        devices=setting.devices,
        partition="iid",
        folder=place,
        server_threads=1,
        dtype=setting.dtype,
        limit_train=setting.preset.limit_train,
        limit_test=setting.preset.limit_test,
        link=setting.link,
    )
    results, figures = local.execute(Console(quiet=True))
    write_files(results, figures, place)
    return figures


def _seeded(settings: RunPlan, seed: int, devices: int) -> RunPlan:
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
