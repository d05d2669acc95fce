"""What was injected and what followed, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich import box
from rich.table import Table

from sfprompt_bench.chaos.campaign import Campaign
from sfprompt_bench.chaos.execution import RunResult
from sfprompt_bench.chaos.faults import Fault, Kind

_COLUMNS: dict[str, Callable[[list[Fault]], int]] = {
    "injected": len,
    "retries": lambda faults: sum(fault.retries for fault in faults),
    "errors": lambda faults: sum(fault.errors for fault in faults),
    "restarts": lambda faults: sum(fault.restarts for fault in faults),
    "rounds again": lambda faults: sum(fault.rounds for fault in faults),
}


def count_by_kind(campaign: Campaign) -> dict[str, dict[str, int]]:
    """Return what was injected and what followed, by kind of fault."""
    injected = campaign.injected
    counts = {}
    for kind in Kind:
        of_kind = [fault for fault in injected if fault.kind is kind]
        counts[str(kind)] = {name: count(of_kind) for name, count in _COLUMNS.items()}
    return counts


def table_of(campaign: Campaign) -> Table:
    """Lay out the counts by kind."""
    table = Table(
        title=f"{len(campaign.injected)} faults in {len(campaign.results)} runs",
        title_justify="left",
        caption="what followed: requests sent again, responses with an error, processes started "
        "again, rounds that a device began again",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_footer=True,
    )
    table.add_column("fault", "all", no_wrap=True)
    for name, count in _COLUMNS.items():
        table.add_column(name, str(count(campaign.injected)), justify="right")
    for kind, counts in count_by_kind(campaign).items():
        if counts["injected"]:
            table.add_row(kind, *(str(counts[name]) for name in _COLUMNS))
    return table


def describe_failure(result: RunResult) -> str:
    """Say what went wrong in a run, after which faults."""
    lines = [f"run with seed {result.seed} ({result.form}):"]
    lines += [f"  {problem}" for problem in result.problems]
    lines.append("  after:")
    faults = sorted(result.injected, key=lambda fault: fault.injected_at or 0.0)
    lines += [
        f"    {fault.injected_at or 0.0:6.2f} s  {fault.describe()} ({fault.target})"
        for fault in faults
    ]
    return "\n".join(lines)


def to_json(campaign: Campaign, seconds: float) -> dict[str, Any]:
    """Return the whole report as JSON values."""
    return {
        "seed": campaign.seed,
        "seconds": round(seconds, 1),
        "runs": len(campaign.results),
        "faults": len(campaign.injected),
        "small_disks": campaign.has_small_disks,
        "kinds": count_by_kind(campaign),
        "repeated_rounds": sum(
            result.outcome.repeated for result in campaign.results if result.outcome
        ),
        "failed": [
            {
                "seed": result.seed,
                "form": result.form,
                "problems": result.problems,
                "faults": [dataclasses.asdict(fault) for fault in result.injected],
            }
            for result in campaign.failed
        ],
        "references": {
            form: {
                "tail": reference.outcome.tail,
                "prompts": reference.outcome.prompts,
                "requests": reference.requests,
            }
            for form, reference in campaign.references.items()
            if reference.outcome
        },
    }
