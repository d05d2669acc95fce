"""The cost of every method for one question, and `sfprompt` against the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.plan import TrainingPlan
from protocol.presets import over_form
from protocol.settings import RunSettings
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.methods.registry import ESTIMATED
from sfprompt_bench.methods.sfprompt import SFPromptPaper


def paper_training() -> TrainingPlan:
    """The training settings of the paper's form."""
    return RunSettings.model_validate(over_form("paper", {})).plan.training


def estimate(question: Question, paper: TrainingPlan | None = None) -> dict[str, MethodCost]:
    """Calculate each method's cost for one device, by the method's name, in the tables' order.

    Methods that the backbone does not support are left out. Models are built on the meta device:
    no weights are read, and the models take no memory.

    Args:
        question: the run and the device.
        paper: the training settings of `sfprompt-paper`; None: those of the run.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: the settings do not fit the backbone.
        InvalidField: the size of a codec's payload depends on the values.
    """
    costs = {
        name: method.cost(question)
        for name, method in ESTIMATED.items()
        if method.is_applicable(question)
    }
    if paper is not None:
        plan = question.plan.model_copy(update={"training": paper})
        published = dataclasses.replace(question, plan=plan)
        costs[SFPromptPaper.name] = SFPromptPaper().cost(published)
    return costs


@dataclass(frozen=True)
class Ratios:
    """`sfprompt` over other methods in a whole run, start included on both sides.

    Attributes:
        bytes_vs_paper: bytes over those of `sfprompt-paper`.
        bytes_vs_full: bytes over those of `fl-full`.
        bytes_vs_fedpeft_prompt: bytes over those of `fedpeft-prompt`.
        flops_vs_full: operations on the device over those of `fl-full`.
        break_even_rounds: rounds after which `sfprompt` and `fedpeft-prompt` have moved equally
            many bytes, `bytes_up_once` and evaluations included; None: never. Before that, the
            method with the smaller start has moved less.
    """

    bytes_vs_paper: float
    bytes_vs_full: float
    bytes_vs_fedpeft_prompt: float
    flops_vs_full: float
    break_even_rounds: float | None


def ratios(costs: Mapping[str, MethodCost], rounds: int) -> Ratios:
    """Compare the costs of `estimate` over ``rounds`` rounds, at least 1."""
    sfprompt, paper = costs["sfprompt"], costs["sfprompt-paper"]
    full, prompt = costs["fl-full"], costs["fedpeft-prompt"]
    moved = sfprompt.bytes_total(rounds)
    return Ratios(
        bytes_vs_paper=moved / paper.bytes_total(rounds),
        bytes_vs_full=moved / full.bytes_total(rounds),
        bytes_vs_fedpeft_prompt=moved / prompt.bytes_total(rounds),
        flops_vs_full=sfprompt.flops_total(rounds) / full.flops_total(rounds),
        break_even_rounds=_break_even_rounds(sfprompt, prompt),
    )


def _break_even_rounds(first: MethodCost, second: MethodCost) -> float | None:
    """Where the two straight lines of bytes over rounds cross, if they do after the start."""
    start_difference = _bytes_at_start(second) - _bytes_at_start(first)
    slope_difference = _mean_bytes_per_round(first) - _mean_bytes_per_round(second)
    if slope_difference == 0 or start_difference / slope_difference <= 0:
        return None
    return start_difference / slope_difference


def _bytes_at_start(cost: MethodCost) -> int:
    return cost.bytes_start + cost.bytes_up_once


def _mean_bytes_per_round(cost: MethodCost) -> float:
    """Bytes of a round with its share of an evaluation."""
    interval = cost.evaluate_every
    return cost.bytes_per_round + (cost.bytes_per_evaluation / interval if interval else 0)
