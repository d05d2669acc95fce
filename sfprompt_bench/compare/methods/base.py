"""What every method of a comparison is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edge_client.data import Dataset
from protocol.messages import parse_message
from protocol.plan import RunPlan
from protocol.presets import Form

Advance = Callable[[int, int], None]  # steps done, steps in all

Changes = Mapping[str, Mapping[str, Any]]  # by part of the settings, then by field


class Method(ABC):
    """A way of tuning a model, run over the wire by a server and devices.

    Attributes:
        name: the same in every table and file, and in `sfprompt_bench.estimate.methods`.
        what: it in a sentence.
        form: which preset of the data set it begins from.
        recipe: what it changes of that preset; a comparison may change it again.
        costed_as: the method of `sfprompt_bench.estimate` for its cost; None: it has none.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    form: ClassVar[Form] = "default"
    recipe: ClassVar[Changes] = {}
    costed_as: ClassVar[str | None] = None

    def settings(self, base: RunPlan) -> RunPlan:
        """``base`` with all that makes it a run of this method, whatever the comparison asks for.

        Raises:
            InvalidField: the method cannot be run with these settings.
        """
        return base

    def costed(self, settings: RunPlan) -> RunPlan:
        """The settings of a run as the calculator of costs is to see them."""
        return settings


@dataclass(frozen=True)
class Measured:
    """What a reference reaches."""

    accuracy: float  # on the held-out images, a share of 1
    trainable_parameters: int


class Reference(Method):
    """A way of tuning on one heap of data in one process: nothing crosses a wire."""

    @abstractmethod
    def measure(self, settings: RunPlan, data: Dataset, advance: Advance) -> Measured:
        """Tune and evaluate. Raises whatever the model's package raises."""


def changed(settings: RunPlan, changes: Changes) -> RunPlan:
    """The settings with some fields of some parts set, validated as a whole.

    Raises:
        InvalidField: they do not go together, or there is no such field.
    """
    values = settings.model_dump()
    for part, fields in changes.items():
        values[part] |= fields
    return parse_message(RunPlan, values)
