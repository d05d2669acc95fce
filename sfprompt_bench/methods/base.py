"""What a method of the benchmark consists of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edge_client.data import Dataset
from protocol.messages import parse_message
from protocol.plan import RunPlan
from protocol.presets import Form
from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question

Advance = Callable[[int, int], None]  # called with steps done and total steps

Changes = Mapping[str, Mapping[str, Any]]  # by part of the settings, then by field


class Method(ABC):
    """A method of tuning a model.

    A run's settings follow from the preset of the data set in this ``form``, then ``recipe``, then
    the comparison's own settings, then `settings`.

    Attributes:
        name: in tables, files and settings.
        what: the method in a sentence.
        form: the preset that the settings start from.
        recipe: changes of that preset; a comparison may change them again.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    form: ClassVar[Form] = "default"
    recipe: ClassVar[Changes] = {}

    def settings(self, base: RunPlan) -> RunPlan:
        """Set everything in ``base`` that defines this method; a comparison cannot change it.

        Raises:
            InvalidField: the method cannot run with these settings.
        """
        return base


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

        ``question.settings`` may be a run of this method or of another one: what defines the
        method is not read from it.

        Raises:
            UnsupportedBackboneError: the backbone cannot be cut.
            ModelPlanError: the settings do not fit the backbone.
            InvalidField: the size of a codec's payload depends on the values.
        """


@dataclass(frozen=True)
class ReferenceResult:
    """The result of a reference."""

    accuracy: float  # on the held-out images, 0 to 1
    trainable_parameters: int


class Reference(Method):
    """A method that tunes on the pooled data of all devices in one process, without a network."""

    @abstractmethod
    def measure(self, settings: RunPlan, data: Dataset, advance: Advance) -> ReferenceResult:
        """Tune and evaluate. Raises the errors of the model's package."""


def with_changes(settings: RunPlan, changes: Changes) -> RunPlan:
    """Set some fields of some parts and validate the settings as a whole.

    Raises:
        InvalidField: there is no such field, or the fields contradict each other.
    """
    values = settings.model_dump()
    for part, fields in changes.items():
        values[part] |= fields
    return parse_message(RunPlan, values)
