"""The settings of a comparison, from and to a TOML file."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from edge_client.data.errors import PartitionError
from edge_client.data.partition import parse_scheme
from protocol.base import Message
from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.parts import Text
from protocol.settings import refuse_moved
from sfprompt_bench.presets import merged

PARTS = ("model", "method", "training", "wire", "federation")  # of a run's settings

Scalar = bool | int | float | str

Part = dict[str, Scalar | dict[str, Scalar]]  # a field of a method may be a table

Values = dict[str, Scalar]  # of one point of a sweep, by dotted name

_SWEPT_FIELDS = frozenset(
    {"data", "devices", "partition", "rounds", "limit_train", "limit_test", "shots", "link"}
)

# Fields that other settings of the comparison set, so that no method trains more than another.
_SHARED_FIELDS = {
    "federation": {"rounds": "rounds", "min_participants": "devices"},
    "method": {"name": "methods"},
}


class Comparison(Message):
    """The settings of a comparison.

    A run's settings come from here, the strongest first: what defines the method, the point of the
    sweep, the overrides of the method, the parts that all methods share, the preset of the data
    set, the method's defaults.
    """

    name: Text = "comparison"
    data: Text = Field("digits", description="as in edge-client --data")
    class_names: tuple[Text, ...] | None = None
    devices: int = Field(4, ge=1, le=64)
    partition: Text = Field("iid", description="as in edge-client --partition")
    rounds: int = Field(8, ge=1, le=100_000)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0,), min_length=1)
    methods: tuple[Text, ...] = Field(("sfprompt", "sfprompt-paper"), min_length=1)
    limit_train: int | None = Field(
        None, ge=1, description="training images over all devices; none: all"
    )
    limit_test: int | None = Field(
        None, ge=1, description="test images over all devices; none: all"
    )
    shots: int | None = Field(
        None, ge=1, description="training images of each class over all devices; none: all"
    )
    link: Text | None = Field(None, description="network to simulate, e.g. 20mbit,50ms")
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="accuracy up to which bytes_to_target counts"
    )
    model: Part = {}
    method: Part = Field({}, description="for the methods that have the field")
    training: Part = {}
    wire: Part = {}
    federation: Part = {}
    overrides: dict[str, dict[str, Part]] = Field({}, description="settings of one method, by part")
    sweep: dict[str, tuple[Scalar, ...]] = Field(
        {}, description="values by dotted name of the setting"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_moved(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        refuse_moved(values)
        overrides, sweep = values.get("overrides"), values.get("sweep")
        tables = dict(overrides) if isinstance(overrides, Mapping) else {}
        if isinstance(sweep, Mapping):
            tables["sweep"] = as_table(sweep)
        for name, parts in tables.items():
            if isinstance(parts, Mapping):
                try:
                    refuse_moved(parts)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return values

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, text: str) -> str:
        try:
            return str(parse_scheme(text))
        except PartitionError as error:
            raise ValueError(str(error)) from error

    @field_validator("methods", "seeds")
    @classmethod
    def _check_unique(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        repeated = sorted({str(value) for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"given twice: {', '.join(repeated)}")
        return values

    @model_validator(mode="after")
    def _check_shots(self) -> Comparison:
        if self.shots is not None and self.limit_train is not None:
            raise ValueError("shots and limit_train exclude each other; remove one of them")
        return self

    @model_validator(mode="after")
    def _check_shared_fields(self) -> Comparison:
        tables = {"": {part: getattr(self, part) for part in PARTS}}
        tables |= {f"overrides.{name}.": parts for name, parts in self.overrides.items()}
        tables |= {"sweep.": as_table(dict.fromkeys(self.sweep, 0))}
        for prefix, parts in tables.items():
            for part, shared in _SHARED_FIELDS.items():
                for field, instead in shared.items():
                    if field in parts.get(part, {}):
                        raise ValueError(f"{prefix}{part}.{field} is set by {instead}")
        return self

    @model_validator(mode="after")
    def _check_overrides(self) -> Comparison:
        for name, parts in self.overrides.items():
            for part in parts:
                if part not in PARTS:
                    raise ValueError(f"overrides.{name}.{part} is none of {', '.join(PARTS)}")
        return self

    @model_validator(mode="after")
    def _check_sweep(self) -> Comparison:
        for name, values in self.sweep.items():
            part, dot, field = name.partition(".")
            if not (name in _SWEPT_FIELDS or (dot and part in PARTS and field)):
                known = ", ".join([*sorted(_SWEPT_FIELDS), *(f"{part}.…" for part in PARTS)])
                raise ValueError(f"sweep.{name} is none of {known}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"sweep.{name} needs at least one value, and no value twice")
        return self

    def points(self) -> list[Values]:
        """All combinations of the swept values; a single empty one without a sweep."""
        names = list(self.sweep)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*self.sweep.values())
        ]

    def at(self, point: Values) -> Comparison:
        """This comparison with a point's values for its own settings, and without the sweep.

        Raises:
            InvalidField: a swept value is not allowed.
        """
        values = self.model_dump(exclude={"sweep"})
        return parse_message(
            Comparison, values | {name: value for name, value in point.items() if "." not in name}
        )

    def given(self, method: str, point: Values) -> dict[str, Any]:
        """Merge the parts that the comparison sets for a method.

        The parts of all methods come first, then the overrides of this method, then the point.
        """
        parts: dict[str, Any] = {part: getattr(self, part) for part in PARTS}
        swept = {name: value for name, value in point.items() if "." in name}
        return merged(merged(parts, self.overrides.get(method, {})), as_table(swept))


def as_table(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into tables: ``{"method.cut": 1}`` into ``{"method": {"cut": 1}}``."""
    table: dict[str, Any] = {}
    for name, value in values.items():
        for key in reversed(name.split(".")):
            value = {key: value}
        table = merged(table, value)
    return table


def point_name(point: Mapping[str, Scalar]) -> str:
    """Describe a point: ``partition = dirichlet:0.3, devices = 2``; empty without a sweep."""
    return ", ".join(f"{name} = {value}" for name, value in point.items())


def load_comparison(file: Path) -> Comparison:
    """Read a comparison from a TOML file.

    Raises:
        InvalidField: the file cannot be read, or a setting is wrong; it names the setting.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidField(
            f"the comparison cannot be read ({error})",
            field="file",
            value=str(file),
            hint="docs/results/comparisons has example files",
        ) from error
    return parse_message(Comparison, {"name": file.stem, **values})


# Takes minutes on two cores: few digits, two devices, pretrained weights.
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
    """Write tables of strings, numbers, booleans and lists of these as TOML; None is left out.

    Raises:
        TypeError: TOML cannot represent a value.
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
    return name if _BARE.fullmatch(name) else _string(name)


def _value(value: object) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # 1e-05, inf and nan are TOML as well
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"TOML cannot represent a value of type {type(value).__name__}")


def _string(value: str) -> str:
    # A basic string of TOML escapes as JSON does; DEL must be escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
