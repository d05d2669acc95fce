"""What a method of the benchmark consists of: settings of a tuning method, and their cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from edge_client.data.dataset import Dataset
from protocol.messages import parse_message
from protocol.method import method_class
from protocol.parts import WireSettings
from protocol.presets import Form
from protocol.settings import RunSettings
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.presets import Changes, merged

Advance = Callable[[int, int], None]  # called with steps done and total steps

FLOAT32: Mapping[str, Any] = WireSettings().model_dump()  # the wire of published methods


class Method(ABC):
    """A tuning method (a package of `tuning_methods`, say) with the settings of a comparison.

    Attributes:
        name: in tables, files and settings.
        what: the method in a sentence.
        tuning: name of the tuning method, as `method.name` in a run's settings.
        defaults: changes of the tuning method's defaults; a comparison may change them again.
        fixed: what defines this method; a comparison cannot change it.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    tuning: ClassVar[str]
    defaults: ClassVar[Changes] = {}
    fixed: ClassVar[Changes] = {}

    @property
    def form(self) -> Form:
        """The form of the presets that a comparison's settings start from."""
        return "default" if self.tuning == "sfprompt" else "paper"

    @property
    def fields(self) -> set[str]:
        """The fields of `[method]` that a comparison can set."""
        return tuning_fields(self.tuning) - set(self.fixed.get("method", {}))

    def settings(self, base: RunSettings, given: Changes | None = None) -> RunSettings:
        """The settings of a run of this method.

        Args:
            base: a run of this method or of another one. Where it has a default of its method,
                the default of this method applies.
            given: changes of a comparison. Fields of `[method]` that the tuning method lacks are
                ignored.

        Raises:
            InvalidField: the method cannot run with these settings.
        """
        values: dict[str, Any] = _chosen_values(base)
        for changes in (self.defaults, given or {}, self.fixed):
            values = merged(values, changes)
        known = tuning_fields(self.tuning)
        method = {field: value for field, value in values["method"].items() if field in known}
        return parse_message(RunSettings, {**values, "method": {**method, "name": self.tuning}})


class FederatedMethod(Method):
    """A method that a server and devices run over the wire.

    Attributes:
        is_variant: whether it differs from another method in settings alone, which a cost
            calculation takes from the run; `sfprompt-bench estimate` then has no row for it.
    """

    is_variant: ClassVar[bool] = False

    def is_applicable(self, question: Question) -> bool:
        """Whether the question's backbone supports the method."""
        return True

    @abstractmethod
    def cost(self, question: Question) -> MethodCost:
        """Calculate the cost for one device.

        ``question.plan`` may be of a run of this method or of another one: what defines the
        method is not read from it.

        Raises:
            UnsupportedBackboneError: the backbone cannot be cut.
            ModelPlanError: the plan does not fit the backbone.
            InvalidField: the size of a codec's payload depends on the values.
        """


@dataclass(frozen=True)
class ReferenceResult:
    """The result of a reference."""

    accuracy: float  # on the held-out images, 0 to 1
    trainable_parameters: int
    chosen: Mapping[str, Any] = field(default_factory=dict)  # from the training data, by name


class Reference(Method):
    """A method that tunes on the pooled data of all devices in one process, without a network."""

    @abstractmethod
    def measure(self, settings: RunSettings, data: Dataset, advance: Advance) -> ReferenceResult:
        """Tune and evaluate. Raises the errors of the model's package."""


def tuning_fields(tuning: str) -> set[str]:
    """The fields of a tuning method's `[method]` table, without its name."""
    return set(method_class(tuning).model_fields) - {"name"}


def _chosen_values(settings: RunSettings) -> dict[str, Any]:
    """A run's values without those that are the defaults of its method."""
    values = settings.model_dump()
    defaults = settings.method.defaults(dict(settings))
    for part in ("method", "training", "wire"):
        plain = _plain(type(getattr(settings, part))) | defaults.get(part, {})
        fields = values[part].items()
        values[part] = {field: value for field, value in fields if value != plain.get(field)}
    return values


def _plain(part: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a part's fields, as `model_dump` has them."""
    defaults = {field: info.default for field, info in part.model_fields.items()}
    return {
        field: default.model_dump() if isinstance(default, BaseModel) else default
        for field, default in defaults.items()
    }
