"""An estimate as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from protocol.settings import RunSettings
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.estimate.calculator import Ratios, ratios

_COLUMNS = ("tuned", "start", "up", "down", "in all", "TFLOP", "memory")


def estimate_table(question: Question, costs: Mapping[str, MethodCost]) -> Table:
    """Show the costs of `estimate`, a row for each method; totals are over the run's rounds."""
    run, rounds = question.plan, question.plan.federation.rounds
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
        table.add_row(
            name,
            f"{cost.trainable_parameters / 1e6:.3f}",
            _mega(cost.bytes_start),
            _mega(cost.bytes_up_per_round),
            _mega(cost.bytes_down_per_round),
            _mega(cost.bytes_total(rounds)),
            _short(cost.flops_total(rounds) / 1e12),
            _mega(cost.device_peak_bytes),
        )
    return table


def estimate_report(
    settings: RunSettings, question: Question, costs: Mapping[str, MethodCost]
) -> dict[str, Any]:
    """Convert the costs of `estimate` to values for JSON; ``settings`` are the question's."""
    rounds = settings.federation.rounds
    return {
        "settings": settings.model_dump(mode="json"),
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


def _caption(shares: Ratios) -> str:
    break_even = shares.break_even_rounds
    crossing = "never" if break_even is None else f"after {break_even:,.1f} rounds"
    return (
        f"sfprompt moves {_percent(shares.bytes_vs_paper)} of the bytes of sfprompt-paper, "
        f"{_percent(shares.bytes_vs_full)} of fl-full's, "
        f"{_percent(shares.bytes_vs_fedpeft_prompt)} of fedpeft-prompt's (equal {crossing}), "
        f"with {_percent(shares.flops_vs_full)} of fl-full's operations.\n"
        "tuned: millions of numbers. start, up, down: MB before the first round, and sent and "
        "received in a round. in all, TFLOP: the whole run, evaluation and single transfers "
        "included in the bytes. memory: peak in MB. Payloads without headers."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _mega(count: int) -> str:
    return _short(count / 1e6)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"
