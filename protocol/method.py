"""A tuning method as an object: its settings, its defaults, and where its code is.

The core (transport, engine, rounds, codecs, storage) knows no method by name. A method is a package
with a subclass of `MethodSettings`, announced under the entry point group `GROUP`:

    [project.entry-points."sfprompt.methods"]
    my-method = "my_package.settings:MyMethod"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError

from protocol.base import Message
from protocol.errors import InvalidField
from protocol.plan import ModelPlan, RunPlan, TrainingPlan, WirePlan

if TYPE_CHECKING:
    from protocol.settings import RunSettings

__all__ = [
    "GROUP",
    "Fields",
    "MethodSettings",
    "load_class",
    "method_class",
    "method_names",
    "parse_method",
    "register",
]

GROUP = "sfprompt.methods"

Fields = dict[str, Any]

_registered: dict[str, type[MethodSettings]] = {}


class MethodSettings(Message):
    """The `[method]` table of a run. A subclass declares its fields and what they mean.

    Attributes:
        name: of the method, as `method.name` in a run's settings.
        source: the paper or page that the method is from.
        device: the class of its device side, "module:Class".
        server: the class of its server side, "module:Class".
    """

    name: str
    source: ClassVar[str] = ""
    device: ClassVar[str] = "edge_client.method:DeviceMethod"
    server: ClassVar[str] = "split_server.method:ServerMethod"

    @model_validator(mode="before")
    @classmethod
    def _complete_tables(cls, values: Any) -> Any:
        """Fill a table that is given in part from the field's default, not from its class's."""
        if not isinstance(values, Mapping):
            return values
        completed = dict(values)
        for field, info in cls.model_fields.items():
            if isinstance(info.default, BaseModel) and isinstance(values.get(field), Mapping):
                completed[field] = {**_dump(info.default), **values[field]}
        return completed

    @property
    def renews_head(self) -> bool:
        """Whether the run's head may change between rounds."""
        return False

    def defaults(self) -> dict[str, dict[str, Any]]:
        """Defaults of the method for `training` and `wire`, where a run leaves a field open."""
        return {}

    def model_part(self, settings: RunSettings) -> Fields:
        """Fields of `ModelPlan` that the backbone's settings lack."""
        return {}

    def training_part(self) -> Fields:
        """Fields of `TrainingPlan` that the training settings lack."""
        return {}

    def wire_part(self) -> Fields:
        """Fields of `WirePlan` that the wire settings lack."""
        return {}

    def plan_part(self) -> Fields:
        """Further fields of `RunPlan`."""
        return {}

    def check(self, settings: RunSettings) -> None:
        """Refuse settings that do not go together. Must not need torch or the backbone.

        Raises:
            ValueError: names the fields.
        """
        self.plan(settings)

    def plan(self, settings: RunSettings) -> RunPlan:
        """The plan that server and devices execute.

        Raises:
            InvalidField: the backbone does not have what the method needs.
        """
        return self.resolve(settings, self.model_part(settings))

    def resolve(self, settings: RunSettings, model_part: Fields) -> RunPlan:
        """The plan with these fields of `ModelPlan`.

        Raises:
            ValidationError: the settings do not go together.
        """
        model = _dump(settings.model) | model_part
        training = _dump(settings.training) | self.training_part()
        wire = _dump(settings.wire) | self.wire_part()
        return RunPlan(
            name=settings.name,
            seed=settings.seed,
            class_names=settings.class_names,
            model=ModelPlan.model_validate(model),
            federation=settings.federation,
            training=TrainingPlan.model_validate(training),
            wire=WirePlan.model_validate(wire),
            **self.plan_part(),
        )

    def side(self, name: str) -> type[Any]:
        """The class of the method's "device" or "server" side, imported when it is needed."""
        return load_class(getattr(self, name))


def _dump(part: BaseModel) -> dict[str, Any]:
    return {field: getattr(part, field) for field in type(part).model_fields}


def load_class(reference: str) -> type[Any]:
    """Import the class that a "module:Class" names."""
    module, _, attribute = reference.partition(":")
    loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def register(cls: type[MethodSettings]) -> type[MethodSettings]:
    """Make a method known to this process; installed packages use an entry point instead.

    Raises:
        ValueError: another method has the name.
    """
    name = str(cls.model_fields["name"].default)
    if name in method_names() and _registered.get(name) is not cls:
        raise ValueError(f"there is a method called {name} already")
    _registered[name] = cls
    method_class.cache_clear()
    return cls


def method_names() -> list[str]:
    """The names of all methods that are installed or registered, sorted."""
    return sorted({*_registered, *(entry.name for entry in entry_points(group=GROUP))})


@lru_cache(maxsize=64)
def method_class(name: str) -> type[MethodSettings]:
    """The settings class of a method.

    Raises:
        InvalidField: no such method is installed.
    """
    if name in _registered:
        return _registered[name]
    for entry in entry_points(group=GROUP, name=name):
        cls: type[MethodSettings] = entry.load()
        return cls
    raise InvalidField(
        "there is no such method",
        field="method.name",
        limit=method_names(),
        value=name,
        hint="is the package that has it installed?",
    )


def parse_method(values: object) -> MethodSettings:
    """The `[method]` table as an object of its method's class.

    Raises:
        ValidationError: a field is wrong.
        PydanticCustomError: no such method.
    """
    if isinstance(values, MethodSettings):
        return values
    if not isinstance(values, Mapping):
        raise PydanticCustomError(
            "method", "method is a table with a name", {"expected": "a table"}
        )
    name = values.get("name", "sfprompt")
    try:
        cls = method_class(str(name))
    except InvalidField as error:
        raise PydanticCustomError(
            "unknown_method", "{reason}", {"reason": error.message, "expected": str(error.limit)}
        ) from error
    return cls.model_validate(dict(values))
