"""The answer to a question: every method's cost."""

from __future__ import annotations

import dataclasses

from protocol.plan import TrainingPlan
from protocol.presets import over_form
from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question
from sfprompt_bench.estimate.methods import METHODS
from sfprompt_bench.estimate.methods.split import SFPromptPaper


def paper_training() -> TrainingPlan:
    """How the paper's form trains, where a question leaves it open."""
    return TrainingPlan.model_validate(over_form("paper", {})["training"])


def estimate(question: Question, paper: TrainingPlan | None = None) -> dict[str, MethodCost]:
    """What each method costs one device, by the method's name, in the order of tables.

    Args:
        question: the run.
        paper: how `sfprompt-paper` trains, where that is not as the run does.

    Methods that the backbone does not allow are left out.

    Models are built on the meta device: no weights are read and no memory is taken for them.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        SplitSettingsError: the settings do not fit the backbone.
        InvalidField: the size of a codec's payload cannot be known ahead.
    """
    costs = {
        name: method.cost(question) for name, method in METHODS.items() if method.applies(question)
    }
    if paper is not None:
        settings = question.settings.model_copy(update={"training": paper})
        asked = dataclasses.replace(question, settings=settings)
        costs[SFPromptPaper.name] = SFPromptPaper().cost(asked)
    return costs
