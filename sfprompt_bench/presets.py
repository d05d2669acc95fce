"""Presets of runs, changes of their settings, and options that commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from protocol.errors import NotFound
from protocol.federation import FederationSettings
from protocol.messages import parse_message
from protocol.presets import FORMS, Form, over_form
from protocol.settings import RunSettings
from split_server.settings import DType

Changes = Mapping[str, Mapping[str, Any]]  # by part of the settings, then by field


@dataclass(frozen=True)
class Preset:
    """A run's settings and its data."""

    data: str  # as in `edge-client --data`
    settings: RunSettings
    limit_train: int | None = None  # images over all devices
    limit_test: int | None = None


_MODEL = {"image_size": 42, "num_classes": 10}

_METHOD: dict[Form, dict[str, Any]] = {"default": {}, "paper": {"prompt_count": 5}}


def _run(name: str, form: Form, **more: object) -> RunSettings:
    values = over_form(form, {"name": name, "model": _MODEL, "method": _METHOD[form], **more})
    return RunSettings.model_validate(values)


def _digits(form: Form) -> Preset:
    federation = FederationSettings(rounds=8)
    return Preset(data="digits", settings=_run("digits", form, federation=federation))


def _fashion_mnist(form: Form) -> Preset:
    from edge_client.data.fashion_mnist import CLASSES  # imports torch

    return Preset(
        data="fashion-mnist",
        settings=_run(
            "fashion-mnist",
            form,
            class_names=CLASSES,
            federation=FederationSettings(rounds=10, evaluate_every=2),
        ),
        limit_train=6000,
        limit_test=2000,
    )


PRESETS = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def preset_named(data: str, form: str = "default") -> Preset:
    """Look up the preset of a data set in one form of the method.

    Raises:
        NotFound: there is no such preset or form.
    """
    make_preset = PRESETS.get(data)
    if make_preset is None:
        raise NotFound(
            "there is no preset for this data set", field="data", limit=sorted(PRESETS), value=data
        )
    for known in FORMS:
        if known == form:
            return make_preset(known)
    raise NotFound("there is no such form", field="form", limit=list(FORMS), value=form)


def traffic_preset(form: Form, *, quick: bool) -> Preset:
    """The preset of `sfprompt-bench traffic`: Fashion-MNIST, or with ``quick`` a few digits."""
    if not quick:
        preset = preset_named("fashion-mnist", form)
        federation = preset.settings.federation.model_copy(update={"evaluate_every": 10})
    else:
        settings = _run("digits", form)
        preset = Preset("digits", settings, limit_train=200, limit_test=100)
        federation = FederationSettings(rounds=3, evaluate_every=3)
    settings = preset.settings.model_copy(update={"federation": federation})
    return replace(preset, settings=settings)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``first`` with those of ``second``; tables in both are merged likewise."""
    result = dict(first)
    for key, value in second.items():
        known = result.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            value = merged(known, value)
        result[key] = value
    return result


def with_changes(settings: RunSettings, changes: Changes) -> RunSettings:
    """Set some fields of some parts and validate the settings as a whole.

    A `[method]` with another name replaces the whole table; other parts keep their values.

    Raises:
        InvalidField: there is no such field, or the fields contradict each other.
    """
    values = settings.model_dump()
    if changes.get("method", {}).get("name", settings.method.name) != settings.method.name:
        values["method"] = {}
    return parse_message(RunSettings, merged(values, changes))


DTypeOption = Annotated[
    DType,
    typer.Option(
        help="Data type of the body's computation; auto is float32 on a CPU. bfloat16 takes half "
        "the time on a CPU with instructions for it."
    ),
]

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this JSON file.")
]
