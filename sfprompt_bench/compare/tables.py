"""A comparison's tables: results, and the cost of one device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from protocol.traffic import Phase, total_bytes
from sfprompt_bench.compare.results import Outcome

MB = 1e6

_ABSENT = "-"

_NOT_TRAINING = frozenset({Phase.INFERENCE, Phase.CONTROL})  # neither start nor training


def result_table(outcomes: Sequence[Outcome], title: str, target: float | None) -> Table:
    """Show accuracy, worst device, bytes of one device in the whole run, privacy spent, and time.

    Args:
        outcomes: of one point of a sweep.
        title: of the table; it names the point.
        target: accuracy up to which bytes count; None: no column for it.
    """
    table = _table(title)
    columns = ["accuracy", "worst device", "MB in all"]
    columns += [] if target is None else [f"MB to {target:.0%}"]
    private = any(outcome.mean("epsilon") is not None for outcome in outcomes)
    columns += ["epsilon"] if private else []
    for name in (*columns, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        if not outcome.figures:
            table.add_row(outcome.method, "failed", style="red")
            continue
        cells = [
            _share_with_spread(outcome, "accuracy"),
            _share_with_spread(outcome, "accuracy_worst_client"),
            _cell(outcome, "bytes_total", _megabytes),
        ]
        if target is not None:
            cells.append(_cell(outcome, "bytes_to_target", _megabytes))
        if private:
            cells.append(_cell(outcome, "epsilon", _short))
        table.add_row(outcome.method, *cells, _cell(outcome, "seconds", _seconds))
    table.caption = (
        "Means over the seeds ± standard deviation. Bytes are those of one device at the socket, "
        "start included."
    )
    table.caption_justify = "left"
    return table


def cost_table(outcomes: Sequence[Outcome]) -> Table:
    """Show a device's numbers, bytes, operations, memory and processor time."""
    table = _table("One device")
    names = ("tuned", "start", "up", "down", "calc.", "GFLOP", "memory", "CPU s")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        if outcome.figures:
            table.add_row(
                outcome.method,
                _cell(outcome, "trainable_parameters", _millions),
                _cell(outcome, "bytes_start", _megabytes),
                _cell(outcome, "bytes_up_per_round", _megabytes),
                _cell(outcome, "bytes_down_per_round", _megabytes),
                measured_over_calculated(outcome),
                _cell(outcome, "device_flops_total", _giga),
                _cell(outcome, "device_peak_bytes", _megabytes),
                _cell(outcome, "device_seconds", _seconds),
            )
    table.caption = (
        "tuned: millions of numbers. start, up, down: MB before the first round, and sent and "
        "received in a round. calc.: measured bytes of start and training over the calculated "
        "payloads. GFLOP: the whole run, counted on the meta device. memory: peak in MB, libraries "
        "included."
    )
    table.caption_justify = "left"
    return table


def measured_over_calculated(outcome: Outcome) -> str:
    """Divide the measured bytes of start and training by the calculated payloads.

    Evaluation is left out: for some methods it is not calculated.
    """
    shares = []
    for figures in outcome.figures:
        cost = figures["calculated"]
        if cost is not None:
            rounds = cost.get("rounds_trained", len(figures["curve"]))  # older results have none
            per_round = cost["bytes_up_per_round"] + cost["bytes_down_per_round"]
            payload = cost["bytes_start"] + cost["bytes_up_once"] + rounds * per_round
            payload += cost.get("bytes_renewed", 0)  # older results have none
            measured = {
                phase: counts
                for phase, counts in figures["bytes"].items()
                if phase not in _NOT_TRAINING
            }
            shares.append(total_bytes(measured) / payload)
    return f"{statistics.fmean(shares):.2f}x" if shares else _ABSENT


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("method", overflow="fold")
    return table


def _cell(outcome: Outcome, name: str, text_of: Callable[[float], str]) -> str:
    mean = outcome.mean(name)
    return _ABSENT if mean is None else text_of(mean)


def _share_with_spread(outcome: Outcome, name: str) -> str:
    mean, spread = outcome.mean(name), outcome.spread(name)
    if mean is None or spread is None:
        return _ABSENT
    return f"{mean:.1%} ± {100 * spread:.1f}" if len(outcome.seeds) > 1 else f"{mean:.1%}"


def _megabytes(count: float) -> str:
    return _short(count / MB)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}"


def _giga(count: float) -> str:
    return _short(count / 1e9)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"
