"""What is compared: the settings of a comparison, from one TOML file."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from edge_client.data import PartitionError, parse_scheme
from protocol.base import Message
from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import Text

PARTS = ("model", "federation", "training", "wire", "distillation")  # of a run's settings

Scalar = bool | int | float | str

Part = dict[str, Scalar]

Values = dict[str, Scalar]  # of one point of a sweep, by dotted name

_SWEPT_HERE = frozenset(
    {"data", "devices", "partition", "rounds", "limit_train", "limit_test", "shots", "link"}
)

# Told once for all methods, so that no method can be given more than another.
_TOLD_ONCE = {"rounds": "rounds", "min_participants": "devices"}


class Comparison(Message):
    """Everything that the tasks of a comparison are made from.

    What a run's settings are, later ones first: what makes a method this method, the point of the
    sweep, the overrides of the method, the parts that all methods share, the method's own preset.
    """

    name: Text = "comparison"
    data: Text = Field("digits", description="as edge-client --data takes it")
    class_names: tuple[Text, ...] | None = None
    devices: int = Field(4, ge=1, le=64)
    partition: Text = Field("iid", description="as edge-client --partition takes it")
    rounds: int = Field(8, ge=1, le=100_000)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0,), min_length=1)
    methods: tuple[Text, ...] = Field(("sfprompt", "sfprompt-paper"), min_length=1)
    limit_train: int | None = Field(None, ge=1, description="images over all devices; none: all")
    limit_test: int | None = Field(None, ge=1)
    shots: int | None = Field(
        None, ge=1, description="training images of each class over all devices; none: all"
    )
    link: Text | None = Field(None, description="a line to simulate, e.g. 20mbit,50ms")
    target_accuracy: float | None = Field(None, gt=0, le=1, description="bytes are counted up to")
    model: Part = {}
    federation: Part = {}
    training: Part = {}
    wire: Part = {}
    distillation: Part = {}
    overrides: dict[str, dict[str, Part]] = Field({}, description="by method, then as the parts")
    sweep: dict[str, tuple[Scalar, ...]] = Field({}, description="values by dotted name")

    @field_validator("partition")
    @classmethod
    def _readable_partition(cls, text: str) -> str:
        try:
            return str(parse_scheme(text))
        except PartitionError as error:
            raise ValueError(str(error)) from error

    @field_validator("methods", "seeds")
    @classmethod
    def _each_once(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = sorted({str(one) for one in given if given.count(one) > 1})
        if twice:
            raise ValueError(f"given twice: {', '.join(twice)}")
        return given

    @model_validator(mode="after")
    def _shots_are_the_limit(self) -> Comparison:
        if self.shots is not None and self.limit_train is not None:
            raise ValueError("shots and limit_train both say how many training images there are")
        return self

    @model_validator(mode="after")
    def _nothing_is_told_twice(self) -> Comparison:
        places = [("", self.federation)]
        places += [
            (f"overrides.{name}.", each.get("federation", {}))
            for name, each in self.overrides.items()
        ]
        for where, part in places:
            for field, instead in _TOLD_ONCE.items():
                if field in part:
                    raise ValueError(f"{where}federation.{field} is set by {instead}")
        return self

    @model_validator(mode="after")
    def _overrides_are_of_parts(self) -> Comparison:
        for name, parts in self.overrides.items():
            for part in parts:
                if part not in PARTS:
                    raise ValueError(f"overrides.{name}.{part} is none of {', '.join(PARTS)}")
        return self

    @model_validator(mode="after")
    def _sweeps_are_of_settings(self) -> Comparison:
        for name, values in self.sweep.items():
            part, dot, field = name.partition(".")
            if not (name in _SWEPT_HERE or (dot and part in PARTS and field)):
                known = ", ".join([*sorted(_SWEPT_HERE), *(f"{part}.…" for part in PARTS)])
                raise ValueError(f"sweep.{name} is none of {known}")
            if field in _TOLD_ONCE:
                raise ValueError(f"sweep.{name} is set by {_TOLD_ONCE[field]}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"sweep.{name} needs at least one value, each of them once")
        return self

    def points(self) -> list[Values]:
        """Every combination of the swept values; one empty one without a sweep."""
        names = list(self.sweep)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*self.sweep.values())
        ]

    def at(self, point: Values) -> Comparison:
        """This comparison with what a point sets of its own settings, and without the sweep.

        Raises:
            InvalidField: a swept value is not allowed.
        """
        values = self.model_dump(exclude={"sweep"})
        return parse_message(
            Comparison, values | {name: value for name, value in point.items() if "." not in name}
        )

    def shared(self, method: str, point: Values) -> dict[str, Part]:
        """The parts of a run's settings that are not the method's own, the strongest merged last.

        Those of all methods, then the overrides of this one, then the point.
        """
        merged: dict[str, Part] = {}
        swept = {name: value for name, value in point.items() if "." in name}
        for part in PARTS:
            own = self.overrides.get(method, {}).get(part, {})
            merged[part] = dict(getattr(self, part)) | own
        for name, value in swept.items():
            part, _, field = name.partition(".")
            merged[part][field] = value
        return merged


def point_name(point: Mapping[str, Scalar]) -> str:
    """A point for people: ``partition = dirichlet:0.3, devices = 2``; empty without a sweep."""
    return ", ".join(f"{name} = {value}" for name, value in point.items())


def load_comparison(file: Path) -> Comparison:
    """Read a comparison from a TOML file.

    Raises:
        InvalidField: the file cannot be read, or a setting is wrong; it names the setting.
    """
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidField(
            f"the comparison cannot be read ({error})", field="file", value=str(file)
        ) from error
    return parse_message(Comparison, {"name": file.stem, **values})


# Minutes on two cores: few digits, two devices, real weights.
QUICK = Comparison(
    name="quick",
    data="digits",
    devices=2,
    rounds=3,
    methods=("splitfed-linear", "sfprompt-paper", "sfprompt", "central", "linear-probe"),
    limit_train=400,
    limit_test=200,
    federation={"evaluate_every": 1},
)

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(values: Mapping[str, Any]) -> str:
    """Tables of texts, numbers, truth values and lists of these. What is None is left out.

    Raises:
        TypeError: TOML has no form for a value.
    """
    return "\n".join(_table((), values)) + "\n"


def _table(path: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    lines = [
        f"{_key(name)} = {_value(value)}" for name, value in plain.items() if value is not None
    ]
    if path:
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += _table((*path, name), value)
    return lines


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _value(value: object) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # 1e-05, inf and nan are TOML as well
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"TOML has no form for {type(value).__name__}")


def _text(value: str) -> str:
    # A basic string of TOML escapes as JSON does; DEL must be escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
