"""The ladder: the paper's form, one more measure on each rung up to the default, and their runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from protocol.settings import RunSettings
from protocol.traffic import Phase
from sfprompt_bench.compare.tasks import Figures, Task, perform_all
from sfprompt_bench.presets import Changes, Preset, with_changes
from sfprompt_bench.run.local_run import LocalRun
from sfprompt_bench.run.report import write_files


@dataclass(frozen=True)
class Rung:
    """One measure, in addition to those before it.

    Attributes:
        name: short, for tables and plots.
        what: the measure in a sentence.
        settings: of the run on this rung.
    """

    name: str
    what: str
    settings: RunSettings


def ladder(paper: RunSettings, default: RunSettings) -> list[Rung]:
    """Make the rungs from the paper's form of a run to its default form.

    The first and the last are these two. A measure without effect between them has no rung.
    """
    rungs = [Rung("paper", "the paper's form: four tensors a step, all tokens, float32", paper)]
    for name, what, changes in _measures(default, paper.plan.model.prompt_count):
        settings = with_changes(rungs[-1].settings, changes)
        if settings != rungs[-1].settings:
            rungs.append(Rung(name, what, settings))
    rungs[-1] = replace(rungs[-1], what=f"{rungs[-1].what}: the default form")
    return rungs


def _measures(default: RunSettings, prompts: int) -> Iterator[tuple[str, str, Changes]]:
    """Name, description and changes of each measure, in the order of the ladder.

    The training settings change together with the method that they were tuned for, except the
    share of selected samples.
    """
    wire, values = default.wire, default.model_dump()
    prompted = _with_prompts(default, prompts)
    training = prompted.plan.training
    step_tensors = dict.fromkeys(("smashed", "features", "gradients"), "bfloat16")
    yield "bfloat16", "the tensors of a step in bfloat16", {"wire": step_tensors}
    yield (
        "lean features",
        "only the features that the tail reads",
        {"wire": {"pooled_features": wire.pooled_features}},
    )
    plain = {"keep_fraction": 1.0, "keep_smashed": False}
    yield (
        "at the cut",
        f"{prompted.plan.model.prompt_depth} prompts in the body, tuned there, with training "
        "settings for them; all samples, whose smashed data cross in every round",
        {
            "method": prompted.method.model_dump() | plain,
            "training": prompted.training.model_dump(),
        },
    )
    yield (
        "kept",
        "a sample's smashed data sent once and kept by the server",
        {"method": {"keep_smashed": values["method"]["keep_smashed"]}},
    )
    yield (
        "coded smashed",
        f"smashed data in {wire.smashed}",
        {"wire": {"smashed": wire.smashed}},
    )
    fields = ("features", "gradients", "stochastic_rounding", "inference")
    yield (
        "coded steps",
        f"features in {wire.features}, gradients in {wire.gradients}",
        {"wire": {name: values["wire"][name] for name in fields}},
    )
    yield (
        "coded states",
        f"head in {wire.head}, updates in {wire.updates} as changes of the state",
        {"wire": values["wire"]},
    )
    yield (
        "fewer samples",
        f"in each round {training.keep_fraction:.0%} of the samples, pruned by {training.pruning}",
        {"method": prompted.method.model_dump()},
    )
    yield (
        "closed form",
        f"no prompts, a tail on {default.plan.model.depths} depths: fitted in closed form in round "
        "0, moved by a step in each round",
        {"method": values["method"], "training": values["training"]},
    )


def _with_prompts(default: RunSettings, prompts: int) -> RunSettings:
    """The default form without a closed-form start: prompts and tail tuned by gradients."""
    method = default.method.model_copy(update={"depths": 0, "prompt_count": prompts})
    rates = {"training": dict(method.defaults({})["training"])}
    return with_changes(default, {"method": method.model_dump(), **rates})


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
