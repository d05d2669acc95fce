"""From a comparison to its tasks: every method with every seed at every point of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import RunPlan
from sfprompt_bench.compare.config import PARTS, Comparison, Scalar, Values, point_name
from sfprompt_bench.compare.methods import Method, Reference, method_named
from sfprompt_bench.compare.tasks import Task
from sfprompt_bench.presets import PRESETS, preset_named
from split_model import anatomy

_LIKE_OTHERS = "fashion-mnist"  # whose presets serve data sets that have none

_NOT_OVERRIDDEN = {"federation": {"rounds", "min_participants"}}  # the comparison sets them


@dataclass(frozen=True)
class Job:
    """One method with one seed at one point, and the task that does it."""

    method: Method
    point: Values
    seed: int
    settings: RunPlan
    task: Task


def plan(comparison: Comparison, folder: Path) -> list[Job]:
    """All jobs, each checked as far as can be without running it.

    Jobs whose results cannot differ share a task: a linear probe knows nothing of a sweep over
    the devices' data.

    Raises:
        NotFound: there is no such method.
        InvalidField: a setting is wrong, or does not go with a method; with both names.
    """
    _check_overrides(comparison)
    jobs = []
    for point in comparison.points():
        here = comparison.at(point)
        for name in comparison.methods:
            method = method_named(name)
            for seed in comparison.seeds:
                settings = _settings(comparison, here, method, point, seed)
                jobs.append(_job(here, method, point, seed, settings, folder))
    return jobs


def tasks_of(jobs: list[Job]) -> list[Task]:
    """The tasks behind the jobs, each once."""
    return list({job.task.key: job.task for job in jobs}.values())


def resolved(comparison: Comparison) -> dict[str, Any]:
    """The comparison with every setting of every method written out, for a TOML file.

    It makes the same tasks, also with a release whose presets are others.

    Raises:
        NotFound, InvalidField: as `plan` does.
    """
    overrides = {
        name: _written_out(_settings(comparison, comparison, method_named(name), {}, 0))
        for name in comparison.methods
    }
    values = comparison.model_dump(mode="json") | {"overrides": overrides}
    if comparison.class_names is None:
        values["class_names"] = _preset(comparison.data, "default").class_names
    return values


def _settings(
    whole: Comparison, here: Comparison, method: Method, point: Values, seed: int
) -> RunPlan:
    """A method's settings at a point; ``here`` is the comparison with the point's own values."""
    preset = _preset(here.data, method.form)
    values = preset.model_dump()
    given = whole.shared(method.name, point)
    for part in PARTS:
        values[part] |= {**method.recipe.get(part, {}), **given[part]}
    values |= {"name": method.name, "seed": seed}
    values["class_names"] = here.class_names or preset.class_names
    values["federation"] |= {"rounds": here.rounds, "min_participants": here.devices}
    try:
        settings = method.settings(parse_message(RunPlan, values))
        anatomy(settings.model)
    except InvalidField as error:
        raise _of_method(error, method, point) from error
    _refuse_lost(whole, method, settings, point)
    _refuse_private(here, method, settings)
    return settings


def _preset(data: str, form: str) -> RunPlan:
    kind = data.partition(":")[0]
    if kind in PRESETS:
        return preset_named(kind, form).settings
    other = preset_named(_LIKE_OTHERS, form).settings
    return other.model_copy(update={"class_names": None})


def _of_method(error: InvalidField, method: Method, point: Values) -> InvalidField:
    where = f" at {point_name(point)}" if point else ""
    return InvalidField(
        f"{method.name}{where}: {error.message}",
        field=error.field,
        limit=error.limit,
        value=error.value,
        hint=error.hint,
    )


def _refuse_lost(comparison: Comparison, method: Method, settings: RunPlan, point: Values) -> None:
    """An override of what makes a method this method would be lost without a word."""
    for part, fields in comparison.overrides.get(method.name, {}).items():
        found = getattr(settings, part).model_dump()
        for field, value in fields.items():
            if f"{part}.{field}" not in point and found[field] != value:
                raise InvalidField(
                    f"{method.name} is what it is by this setting",
                    field=f"overrides.{method.name}.{part}.{field}",
                    limit=found[field],
                    value=value,
                    hint="leave it out, or compare another method",
                )


def _refuse_private(here: Comparison, method: Method, settings: RunPlan) -> None:
    """A server has none of the devices' data, so that it cannot distil on them either."""
    how = settings.distillation
    if how.epochs and how.images == here.data.partition(":")[0]:
        raise InvalidField(
            f"{method.name}: a server has none of the devices' images to distil on",
            field="distillation.images",
            limit="random, or another data set than the devices'",
            value=how.images,
        )


def _check_overrides(comparison: Comparison) -> None:
    for name in comparison.overrides:
        if name not in comparison.methods:
            raise InvalidField(
                "overrides are of a method that is compared",
                field=f"overrides.{name}",
                limit=list(comparison.methods),
                value=name,
            )


def _job(
    here: Comparison,
    method: Method,
    point: Values,
    seed: int,
    settings: RunPlan,
    folder: Path,
) -> Job:
    of: dict[str, Any] = {
        "method": method.name,
        "settings": settings.model_dump(mode="json"),
        "data": here.data,
        "limits": [here.limit_train, here.limit_test],
        "shots": here.shots,
    }
    if not isinstance(method, Reference):
        of |= {"devices": here.devices, "partition": here.partition, "link": here.link}
    where = f", {point_name(point)}" if point else ""
    task = Task(f"{method.name}, seed {seed}{where}", folder, of)
    place = folder / "tasks" / f"{method.name}-{seed}-{task.key[:10]}"
    return Job(method, point, seed, settings, Task(task.name, place, of))


def _written_out(settings: RunPlan) -> dict[str, dict[str, Scalar]]:
    every: Mapping[str, dict[str, Scalar | None]] = settings.model_dump(
        mode="json", include=set(PARTS)
    )
    return {
        part: {
            field: value
            for field, value in fields.items()
            if value is not None and field not in _NOT_OVERRIDDEN.get(part, ())
        }
        for part, fields in every.items()
    }
