"""Tuning methods as objects: a method's settings, its defaults, and the classes of its code.

The core (transport, engine, rounds, codecs, storage) knows no method by name. A method is a package
with a subclass of `MethodSettings`, installed under the entry point group `GROUP`:

    [project.entry-points."sfprompt.methods"]
    my-method = "my_package.settings:MyMethod"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from protocol.base import Message
from protocol.errors import InvalidField
from protocol.plan import ModelPlan, RunPlan, TrainingPlan, WirePlan

if TYPE_CHECKING:
    from protocol.settings import RunSettings

__all__ = [
    "GROUP",
    "Fields",
    "MethodSettings",
    "installed_method_names",
    "load_class",
    "method_class",
    "method_names",
    "parse_method",
    "register",
]

GROUP = "sfprompt.methods"

Fields = dict[str, Any]
P = TypeVar("P", bound=Message)

_registered: dict[str, type[MethodSettings]] = {}


class MethodSettings(Message):
    """The `[method]` table of a run. A subclass declares its fields and maps them to a plan.

    Attributes:
        name: the method's name, `method.name` in a run's settings.
        source: the method's paper or page.
        device: "module:Class" of the device's side, a `DeviceMethod`.
        server: "module:Class" of the server's side, a `ServerMethod`.
    """

    name: str
    source: ClassVar[str] = ""
    device: ClassVar[str] = "edge_client.method:DeviceMethod"
    server: ClassVar[str] = "split_server.method:ServerMethod"

    @model_validator(mode="before")
    @classmethod
    def _complete_tables(cls, values: Any) -> Any:
        """Complete a partly given table with the default of the field, not that of its class."""
        if not isinstance(values, Mapping):
            return values
        completed = dict(values)
        for field, info in cls.model_fields.items():
            if isinstance(info.default, BaseModel) and isinstance(values.get(field), Mapping):
                completed[field] = {**_dump(info.default), **values[field]}
        return completed

    @classmethod
    def class_of(cls, values: Mapping[str, Any]) -> type[MethodSettings]:
        """Return the class of the method that a `[method]` table names."""
        return method_class(str(values.get("name", "sfprompt")))

    @property
    def rebuilds_head(self) -> bool:
        """Whether the server may rebuild the run's head between rounds."""
        return False

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the method's defaults, by table and field, for fields that a run does not set.

        Args:
            given: unvalidated settings of the run, by table.
        """
        return {}

    def model_part(self, settings: RunSettings) -> Fields:
        """Return the fields of `ModelPlan` that the backbone's settings lack."""
        return {}

    def training_part(self, settings: RunSettings) -> Fields:
        """Return the fields of `TrainingPlan` that the training settings lack."""
        return {}

    def wire_part(self) -> Fields:
        """Return the fields of `WirePlan` that the wire settings lack."""
        return {}

    def own_part(self) -> Message:
        """Return `RunPlan.method`, which only the method's own code on device and server reads."""
        return Message()

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        """Check that the method's own part fits the other parts of a plan.

        Raises:
            ValueError: names the fields that do not fit.
        """

    def check(self, settings: RunSettings) -> None:
        """Check that the settings fit together. Must not import torch or need the backbone.

        Raises:
            ValueError: names the fields that do not fit.
        """
        self.build_plan(settings)

    def build_plan(self, settings: RunSettings) -> RunPlan:
        """Build the plan that server and devices execute. May import torch.

        Raises:
            InvalidField: the backbone does not fit the method.
        """
        return self.resolve(settings, self.model_part(settings))

    def resolve(self, settings: RunSettings, model_part: Fields) -> RunPlan:
        """Build the plan with these fields of `ModelPlan`. Needs neither torch nor the backbone.

        Raises:
            ValidationError: the settings do not fit together.
        """
        model = _dump(settings.model) | model_part
        training = _dump(settings.training) | self.training_part(settings)
        wire = _dump(settings.wire) | self.wire_part()
        plan = RunPlan(
            name=settings.name,
            seed=settings.seed,
            class_names=settings.class_names,
            model=self.validate_part(ModelPlan, "model", model),
            federation=settings.federation,
            training=self.validate_part(TrainingPlan, "training", training),
            wire=self.validate_part(WirePlan, "wire", wire),
            method=self.own_part().model_dump(mode="json", exclude_defaults=True),
        )
        self.check_plan(plan)
        return plan

    def locate(self, part: str, field: str) -> str:
        """Return the dotted name in a run's settings of a field in a part of the plan."""
        own = field in type(self).model_fields and field != "name"
        return f"method.{field}" if own else f"{part}.{field}"

    def validate_part(self, cls: type[P], part: str, values: Fields) -> P:
        """Validate a part of the plan; an error names the field of the run's settings."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                cls.__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError(
                            "plan", "{message}", {"message": each["msg"], **each.get("ctx", {})}
                        ),
                        loc=(*self.locate(part, str(next(iter(each["loc"]), ""))).split("."),),
                        input=each["input"],
                    )
                    for each in error.errors()
                ],
            ) from None

    def load_side(self, name: str) -> type[Any]:
        """Import the class of the method's "device" or "server" side."""
        return load_class(getattr(self, name))


def _dump(part: BaseModel) -> dict[str, Any]:
    return {field: getattr(part, field) for field in type(part).model_fields}


def load_class(reference: str) -> type[Any]:
    """Import a class by its reference "module:Class".

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such class.
    """
    module, _, attribute = reference.partition(":")
    loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def register(cls: type[MethodSettings]) -> type[MethodSettings]:
    """Register a method in this process; installed packages use an entry point instead.

    Raises:
        ValueError: another method has this name.
    """
    name = str(cls.model_fields["name"].default)
    if name in method_names() and _registered.get(name) is not cls:
        raise ValueError(f"method.name {name} belongs to another method: choose another name")
    _registered[name] = cls
    method_class.cache_clear()
    return cls


def installed_method_names() -> list[str]:
    """List the names of the methods in all installed packages, sorted."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def method_names() -> list[str]:
    """List the names of all installed and registered methods, sorted."""
    return sorted({*_registered, *installed_method_names()})


@lru_cache(maxsize=64)
def method_class(name: str) -> type[MethodSettings]:
    """Return the settings class of a method.

    Raises:
        InvalidField: no method of this name is installed.
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
        hint="install the package with this method, or choose an installed one",
    )


def parse_method(values: object) -> MethodSettings:
    """Parse the `[method]` table as an object of its method's class; default: sfprompt.

    Raises:
        ValidationError: a field is wrong.
        PydanticCustomError: it is not a table, or names no installed method.
    """
    if isinstance(values, MethodSettings):
        return values
    if not isinstance(values, Mapping):
        raise PydanticCustomError(
            "method", "method must be a table with a name", {"expected": "a table"}
        )
    name = values.get("name", "sfprompt")
    try:
        cls = method_class(str(name))
    except InvalidField as error:
        raise PydanticCustomError(
            "unknown_method", "{reason}", {"reason": error.message, "expected": str(error.limit)}
        ) from error
    return cls.model_validate(dict(values))
