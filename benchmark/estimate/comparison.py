"""This project's form of SFPrompt against the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmark.estimate.method_cost import MethodCost


@dataclass(frozen=True)
class Ratios:
    """`sfprompt` in a whole run, start included on both sides.

    Attributes:
        bytes_vs_paper: against `sfprompt-paper`.
        bytes_vs_full: against `fl-full`.
        bytes_vs_fedpeft_prompt: against `fedpeft-prompt`.
        flops_vs_full: operations on the device against `fl-full`.
        break_even_rounds: after so many rounds `sfprompt` and `fedpeft-prompt` have moved equally
            many bytes, what is sent once and evaluations included; None: never. Until then the
            one that needs less to start has moved less.
    """

    bytes_vs_paper: float
    bytes_vs_full: float
    bytes_vs_fedpeft_prompt: float
    flops_vs_full: float
    break_even_rounds: float | None


def ratios(costs: Mapping[str, MethodCost], rounds: int) -> Ratios:
    """Compare the costs of `estimate` over so many rounds, at least 1."""
    own = costs["sfprompt"]
    moved, full, prompt = own.bytes_total(rounds), costs["fl-full"], costs["fedpeft-prompt"]
    return Ratios(
        bytes_vs_paper=moved / costs["sfprompt-paper"].bytes_total(rounds),
        bytes_vs_full=moved / full.bytes_total(rounds),
        bytes_vs_fedpeft_prompt=moved / prompt.bytes_total(rounds),
        flops_vs_full=own.flops_total(rounds) / full.flops_total(rounds),
        break_even_rounds=_break_even(own, prompt),
    )


def _break_even(one: MethodCost, other: MethodCost) -> float | None:
    """Where the two straight lines of bytes over rounds cross, if they do after the start."""
    ahead = _at_start(other) - _at_start(one)
    faster = _rate(one) - _rate(other)
    if faster == 0 or ahead / faster <= 0:
        return None
    return ahead / faster


def _at_start(cost: MethodCost) -> int:
    return cost.bytes_start + cost.bytes_up_once


def _rate(cost: MethodCost) -> float:
    """Bytes a round, evaluations spread over the rounds between them."""
    every = cost.evaluate_every
    return cost.bytes_per_round + (cost.bytes_per_evaluation / every if every else 0)
