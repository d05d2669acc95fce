"""The answer to a question: every method's cost."""

from __future__ import annotations

from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods import METHODS
from benchmark.estimate.question import Question


def estimate(question: Question) -> dict[str, MethodCost]:
    """What each method costs one device, by the method's name, in the order of tables.

    Methods that the backbone does not allow are left out.

    Models are built on the meta device: no weights are read and no memory is taken for them.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        SplitSettingsError: the settings do not fit the backbone.
        InvalidField: the size of a codec's payload cannot be known ahead.
    """
    return {
        name: method.cost(question) for name, method in METHODS.items() if method.applies(question)
    }
