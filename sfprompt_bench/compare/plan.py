"""From a comparison to its tasks: each method with each seed at each point of the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.settings import RunSettings
from sfprompt_bench.compare.config import PARTS, Comparison, Values, as_table, point_name
from sfprompt_bench.compare.tasks import Task
from sfprompt_bench.methods.base import Method, Reference, tuning_fields
from sfprompt_bench.methods.registry import get_method, settable_fields
from sfprompt_bench.presets import PRESETS, preset_named
from split_model.backbone.architecture import anatomy
from tuning_methods.proxies.settings import distillation_of

_OTHER_DATA = "fashion-mnist"  # its presets serve data sets without presets

# The comparison sets them by other fields.
_NOT_OVERRIDDEN = {"federation": {"rounds", "min_participants"}, "method": {"name"}}


@dataclass(frozen=True)
class Job:
    """One method with one seed at one point, and its task."""

    method: Method
    point: Values
    seed: int
    settings: RunSettings
    task: Task


def plan(comparison: Comparison, folder: Path) -> list[Job]:
    """Make all jobs, and check each as far as possible without running it.

    Jobs whose results cannot differ share a task: a sweep over the devices' data has no effect on
    a linear probe.

    Raises:
        NotFound: there is no such method.
        InvalidField: a setting is wrong, or contradicts a method; the error names both.
    """
    _check_overrides(comparison)
    _check_method_fields(comparison)
    jobs = []
    for point in comparison.points():
        at_point = comparison.at(point)
        for name in comparison.methods:
            method = get_method(name)
            for seed in comparison.seeds:
                settings = _settings(comparison, at_point, method, point, seed)
                task = _task(at_point, method, point, seed, settings, folder)
                jobs.append(Job(method, point, seed, settings, task))
    return jobs


def with_methods(comparison: Comparison, methods: Sequence[str]) -> Comparison:
    """The comparison of other methods, without overrides and fields that none of them has.

    Raises:
        NotFound: there is no such method.
        InvalidField: a method is given twice.
    """
    without = settable_fields(comparison.methods) - settable_fields(methods)
    changes = {
        "methods": methods,
        "method": {k: v for k, v in comparison.method.items() if k not in without},
        "overrides": {k: v for k, v in comparison.overrides.items() if k in methods},
    }
    return parse_message(Comparison, comparison.model_dump() | changes)


def tasks_of(jobs: list[Job]) -> list[Task]:
    """The tasks of the jobs, each once."""
    return list({job.task.key: job.task for job in jobs}.values())


def resolved(comparison: Comparison) -> dict[str, Any]:
    """Write out all settings of all methods, for a TOML file.

    It makes the same tasks, also in a release with other presets.

    Raises:
        NotFound, InvalidField: as `plan` does.
    """
    overrides = {
        name: _as_overrides(_settings(comparison, comparison, get_method(name), {}, 0))
        for name in comparison.methods
    }
    values = comparison.model_dump(mode="json") | {"overrides": overrides}
    if comparison.class_names is None:
        values["class_names"] = _preset(comparison.data, "default").class_names
    return values


def _settings(
    comparison: Comparison, at_point: Comparison, method: Method, point: Values, seed: int
) -> RunSettings:
    """A method's settings at a point; ``at_point`` has the point's values for the comparison."""
    preset = _preset(at_point.data, method.form)
    shared = {"rounds": at_point.rounds, "min_participants": at_point.devices}
    base = preset.model_copy(
        update={
            "name": method.name,
            "seed": seed,
            "class_names": at_point.class_names or preset.class_names,
            "federation": preset.federation.model_copy(update=shared),
        }
    )
    try:
        settings = method.settings(base, comparison.given(method.name, point))
        anatomy(settings.plan.model)
    except InvalidField as error:
        raise _with_method(error, method, point) from error
    _check_overrides_apply(comparison, method, settings, point)
    _check_distillation_images(at_point, method, settings)
    return settings


def _preset(data: str, form: str) -> RunSettings:
    kind = data.partition(":")[0]
    if kind in PRESETS:
        return preset_named(kind, form).settings
    other = preset_named(_OTHER_DATA, form).settings
    return other.model_copy(update={"class_names": None})


def _with_method(error: InvalidField, method: Method, point: Values) -> InvalidField:
    where = f" at {point_name(point)}" if point else ""
    return InvalidField(
        f"{method.name}{where}: {error.message}",
        field=error.field,
        limit=error.limit,
        value=error.value,
        hint=error.hint,
    )


def _check_overrides(comparison: Comparison) -> None:
    for name in comparison.overrides:
        if name not in comparison.methods:
            raise InvalidField(
                f"overrides.{name} has no effect, as {name} is not compared",
                field=f"overrides.{name}",
                limit=list(comparison.methods),
                value=name,
                hint="add it to methods, or remove the overrides",
            )
        fields = tuning_fields(get_method(name).tuning)
        for field in comparison.overrides[name].get("method", {}):
            if field not in fields:
                raise InvalidField(
                    f"{name} has no method.{field}",
                    field=f"overrides.{name}.method.{field}",
                    limit=sorted(fields),
                    hint="see the method's settings in docs/settings.md",
                )


def _check_method_fields(comparison: Comparison) -> None:
    """Refuse fields of `[method]` that no compared method has, or that all of them fix."""
    given = as_table({name: name for name in comparison.sweep}).get("method", {})
    known = settable_fields(comparison.methods)
    for field in {**comparison.method, **given}:
        if field not in known:
            raise InvalidField(
                f"none of the compared methods has a method.{field} that can be set",
                field=f"method.{field}",
                limit=sorted(known),
                hint="see docs/settings.md for the fields of each method",
            )


def _check_overrides_apply(
    comparison: Comparison, method: Method, settings: RunSettings, point: Values
) -> None:
    """Refuse an override of a setting that the method itself sets."""
    actual = _dotted(settings.model_dump(mode="json"))
    for name, value in _dotted(comparison.overrides.get(method.name, {})).items():
        field = f"overrides.{method.name}.{name}"
        if name not in actual:
            raise InvalidField(f"{method.name} has no setting {name}", field=field, value=value)
        if name not in point and actual[name] != value:
            raise InvalidField(
                f"{method.name} requires {name} = {actual[name]}",
                field=field,
                limit=actual[name],
                value=value,
                hint="remove the override, or compare another method",
            )


def _dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tables into dotted names, as `as_table` has them."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            values |= {f"{key}.{inner}": leaf for inner, leaf in _dotted(value).items()}
        else:
            values[key] = value
    return values


def _check_distillation_images(
    comparison: Comparison, method: Method, settings: RunSettings
) -> None:
    """Refuse to distil on the devices' data set: a server has none of its images."""
    distillation = distillation_of(settings.plan)
    if distillation.epochs and distillation.images == comparison.data.partition(":")[0]:
        raise InvalidField(
            f"{method.name}: the server has none of the devices' images to distil on",
            field="method.distillation.images",
            limit="random, or another data set than the devices'",
            value=distillation.images,
        )


def _task(
    comparison: Comparison,
    method: Method,
    point: Values,
    seed: int,
    settings: RunSettings,
    folder: Path,
) -> Task:
    inputs: dict[str, Any] = {
        "method": method.name,
        "settings": settings.model_dump(mode="json"),
        "data": comparison.data,
        "limits": [comparison.limit_train, comparison.limit_test],
        "shots": comparison.shots,
    }
    if not isinstance(method, Reference):
        inputs["devices"] = comparison.devices
        inputs["partition"] = comparison.partition
        inputs["link"] = comparison.link
    where = f", {point_name(point)}" if point else ""
    task = Task(f"{method.name}, seed {seed}{where}", folder, inputs)
    task_folder = folder / "tasks" / f"{method.name}-{seed}-{task.key[:10]}"
    return Task(task.name, task_folder, inputs)


def _as_overrides(settings: RunSettings) -> dict[str, Any]:
    values = settings.model_dump(mode="json", exclude=_NOT_OVERRIDDEN)
    return {part: values[part] for part in PARTS}
