"""An estimate for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question


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


_COLUMNS = (
    "tuned",
    "start",
    "up",
    "down",
    "in all",
    "TFLOP",
    "memory",
)


def estimate_table(question: Question, costs: Mapping[str, MethodCost]) -> Table:
    """The costs of `estimate`, a row for each method; totals over the rounds of the run."""
    run, rounds = question.settings, question.settings.federation.rounds
    table = Table(
        title=f"One device, {run.model.backbone} at {run.model.image_size} px, {rounds} rounds",
        title_justify="left",
        caption=_caption(ratios(costs, rounds)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for name, cost in costs.items():
        total = cost.bytes_total(rounds)
        table.add_row(
            name,
            f"{cost.trainable_parameters / 1e6:.3f}",
            _mega(cost.bytes_start),
            _mega(cost.bytes_up_per_round),
            _mega(cost.bytes_down_per_round),
            _mega(total),
            _short(cost.flops_total(rounds) / 1e12),
            _mega(cost.device_peak_bytes),
        )
    return table


def estimate_report(question: Question, costs: Mapping[str, MethodCost]) -> dict[str, Any]:
    """The costs of `estimate` as values that JSON can carry."""
    rounds = question.settings.federation.rounds
    return {
        "settings": question.settings.model_dump(mode="json"),
        "train_samples": question.train_samples,
        "test_samples": question.test_samples,
        "local_epochs": question.local_epochs,
        "rounds": rounds,
        "methods": {
            name: asdict(cost)
            | {"bytes_total": cost.bytes_total(rounds), "flops_total": cost.flops_total(rounds)}
            for name, cost in costs.items()
        },
        "ratios": asdict(ratios(costs, rounds)),
    }


def _caption(found: Ratios) -> str:
    even = found.break_even_rounds
    crossing = "never" if even is None else f"after {even:,.1f} rounds"
    return (
        f"sfprompt moves {_percent(found.bytes_vs_paper)} of the paper's form, "
        f"{_percent(found.bytes_vs_full)} of fl-full, "
        f"{_percent(found.bytes_vs_fedpeft_prompt)} of fedpeft-prompt (equal {crossing}), "
        f"with {_percent(found.flops_vs_full)} of fl-full's operations.\n"
        "Tuned numbers in millions; bytes and memory in MB, up and down in a round; operations in "
        "the whole run.\n"
        "Payloads without headers; start, what is sent once and evaluations are in the total."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _mega(count: int) -> str:
    return _short(count / 1e6)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"
