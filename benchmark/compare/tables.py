"""A comparison in the terminal: what each method reaches, and what it takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from benchmark.compare.outcome import Outcome
from protocol.traffic import Phase, total_bytes

MB = 1e6
_ABSENT = "-"
_APART = frozenset({Phase.INFERENCE, Phase.CONTROL})  # neither start nor training


def result_table(outcomes: Sequence[Outcome], title: str, target: float | None) -> Table:
    """Accuracy, worst device, bytes of one device in the whole run, privacy spent, and time.

    Of one point of a sweep, which is for the title to tell.
    """
    table = _table(title)
    columns = ["accuracy", "worst device", "MB in all"]
    columns += [] if target is None else [f"MB to {target:.0%}"]
    private = any(one.mean("epsilon") is not None for one in outcomes)
    columns += ["epsilon"] if private else []
    for name in (*columns, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        if not one.figures:
            table.add_row(one.method, "failed", style="red")
            continue
        cells = [
            _with_spread(one, "accuracy", _percent),
            _with_spread(one, "accuracy_worst_client", _percent),
            _cell(one, "bytes_total", _megabytes),
        ]
        if target is not None:
            cells.append(_cell(one, "bytes_to_target", _megabytes))
        if private:
            cells.append(_cell(one, "epsilon", _short))
        table.add_row(one.method, *cells, _cell(one, "seconds", _whole_seconds))
    table.caption = (
        "Means over the seeds ± standard deviation. Bytes are those of one device at the socket, "
        "start included."
    )
    table.caption_justify = "left"
    return table


def cost_table(outcomes: Sequence[Outcome]) -> Table:
    """What one device sends, receives, computes and holds; calculated bytes beside measured."""
    table = _table("One device")
    names = ("tuned", "start", "up", "down", "calc.", "GFLOP", "memory", "CPU s")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        if one.figures:
            table.add_row(
                one.method,
                _cell(one, "trainable_parameters", _millions),
                _cell(one, "bytes_start", _megabytes),
                _cell(one, "bytes_up_per_round", _megabytes),
                _cell(one, "bytes_down_per_round", _megabytes),
                against_calculated(one),
                _cell(one, "device_flops_total", _giga),
                _cell(one, "device_peak_bytes", _megabytes),
                _cell(one, "device_seconds", _whole_seconds),
            )
    table.caption = (
        "Tuned numbers in millions; MB to start and in a round of training; bytes of start and "
        "training, measured over calculated payloads; operations of the run, counted on the meta "
        "device; peak memory in MB, libraries included."
    )
    table.caption_justify = "left"
    return table


def against_calculated(outcome: Outcome) -> str:
    """Bytes of start and training as measured, over the payloads that the calculator gives.

    Evaluation is left out: the calculator has none for some of the methods.
    """
    shares = []
    for one in outcome.figures:
        found = one["calculated"]
        if found is not None:
            rounds = found.get("rounds_trained", len(one["curve"]))  # older results have none
            each = found["bytes_up_per_round"] + found["bytes_down_per_round"]
            payload = found["bytes_start"] + found["bytes_up_once"] + rounds * each
            payload += found.get("bytes_renewed", 0)  # older results have none
            moved = {phase: ways for phase, ways in one["bytes"].items() if phase not in _APART}
            shares.append(total_bytes(moved) / payload)
    return f"{statistics.fmean(shares):.2f}x" if shares else _ABSENT


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _megabytes(count: float) -> str:
    return _short(count / MB)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}"


def _giga(count: float) -> str:
    return _short(count / 1e9)


def _whole_seconds(seconds: float) -> str:
    return f"{seconds:,.0f}"


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("method", overflow="fold")
    return table


def _cell(outcome: Outcome, name: str, shown: Callable[[float], str]) -> str:
    mean = outcome.mean(name)
    return _ABSENT if mean is None else shown(mean)


def _with_spread(outcome: Outcome, name: str, shown: Callable[[float], str]) -> str:
    mean, spread = outcome.mean(name), outcome.spread(name)
    if mean is None or spread is None:
        return _ABSENT
    return f"{shown(mean)} ± {100 * spread:.1f}" if len(outcome.seeds) > 1 else shown(mean)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"
