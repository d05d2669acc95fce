"""What every method can tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question


class Method(ABC):
    """A way of tuning a model on devices.

    Attributes:
        name: the same in every table and file.
    """

    name: ClassVar[str]

    def applies(self, question: Question) -> bool:
        """Whether the method can be had with the question's backbone."""
        return True

    @abstractmethod
    def cost(self, question: Question) -> MethodCost:
        """What it costs one device.

        Raises:
            UnsupportedBackboneError: the backbone cannot be cut.
            SplitSettingsError: the settings do not fit the backbone.
            InvalidField: the size of a codec's payload cannot be known ahead.
        """
