"""The tables of a benchmark of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from sfprompt_bench.engine.findings import TARGETS, Findings, meets_target
from sfprompt_bench.engine.roundtrip import RoundTrip
from sfprompt_bench.engine.soak import Soak
from sfprompt_bench.engine.throughput import Point

_MAX_TAKEN = 0.05  # share of the cores that other programs may use without a warning


def ratio_table(findings: Findings) -> Table:
    """Show the main figures and their targets."""
    spreads = {f"throughput_vs_loop_{t.load}": t.ratio for t in findings.throughput}
    spreads["roundtrip_vs_socket"] = findings.roundtrip.ratio
    table = Table(title=f"The engine on {findings.roofline}", title_justify="left")
    table.add_column("figure")
    for name in ("value", "least … most", "target"):
        table.add_column(name, justify="right")
    figures = findings.ratios | {"memory_drift": findings.soak.memory_drift}
    for name, value in figures.items():
        spread = spreads.get(name)
        colour = "green" if meets_target(name, value) else "red"
        table.add_row(
            name,
            f"[{colour}]{value:.3f}[/{colour}]",
            f"{spread.minimum:.3f} … {spread.maximum:.3f}" if spread else "",
            _target(name),
        )
    table.caption = _cores_caption(findings)
    table.caption_justify = "left"
    return table


def throughput_table(findings: Findings) -> Table:
    """Show samples a second, and the processor time of server and clients."""
    table = Table(title="Samples a second", title_justify="left")
    table.add_column("clients x batch")
    for name in ("server", "loop, one batch", "loop, client's batch"):
        table.add_column(name, justify="right")
    for name in ("of matrix rate", "CPU ratio", "server's CPU", "clients' CPU"):
        table.add_column(name, justify="right")
    for throughput in findings.throughput:
        figures = throughput.to_json()
        table.add_row(
            str(throughput.load),
            f"{figures['server_samples_per_s']['median']:,.1f}",
            f"{figures['loop_samples_per_s']['median']:,.1f}",
            f"{throughput.looped_small.samples_per_s:,.1f}",
            f"{findings.matrix_rate_share(throughput):.0%}",
            f"{throughput.cpu_ratio:.3f}",
            f"{figures['server_busy_share']['median']:.0%}",
            f"{figures['client_cpu_share']['median']:.1%}",
        )
    roofline = findings.roofline
    table.caption = (
        f"Matrix rate: {roofline.flops_per_s / 1e9:,.0f} GFLOP/s, measured in one large product; a "
        f"sample takes {roofline.sample_flops / 1e9:.3g} GFLOP, forward and input gradient. "
        "CPU ratio: the loop's CPU seconds a sample over the server's; other programs affect it "
        "less than the clock. CPU: processor seconds in a second, 100 % is one core."
    )
    table.caption_justify = "left"
    return table


def roundtrip_table(trip: RoundTrip) -> Table:
    """Show the processor time of a round trip, by stage."""
    figures = trip.to_json()
    table = Table(
        title=f"{trip.nbytes / 1e6:.2f} MB there and back: {1e3 * figures['seconds']:.2f} ms; "
        f"bare sockets: {1e3 * figures['echo_seconds']:.2f} ms",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("CPU ms for a MB there and back", justify="right")
    for name, value in trip.budget.items():
        table.add_row(name, f"{value:.3f}")
    cpu = trip.cpu
    table.add_section()
    table.add_row("all of the client", f"{2 * cpu['client']:.3f}")
    table.add_row("all of the server", f"{2 * cpu['server']:.3f}")
    table.add_row("both, over the bare sockets'", f"{trip.cpu_ratio:.2f} times")
    return table


def curve_table(points: Sequence[Point]) -> Table:
    """Show the gain of batching, point by point."""
    table = Table(title="Gain of batching", title_justify="left")
    for name in ("clients", "batch", "samples/s", "without", "gain", "least … most"):
        table.add_column(name, justify="right")
    for point in points:
        figures, gain = point.to_json(), point.gain
        table.add_row(
            str(point.load.clients),
            str(point.load.batch),
            f"{figures['samples_per_s']['median']:,.1f}",
            f"{figures['samples_per_s_alone']['median']:,.1f}",
            f"{gain.median:.2f}",
            f"{gain.minimum:.2f} … {gain.maximum:.2f}",
        )
    return table


def soak_table(soak: Soak) -> Table:
    """Show the soak's figures."""
    figures = soak.to_json()
    table = Table(
        title=f"{soak.load.clients} clients of batch {soak.load.batch} for {soak.seconds:,.0f} s",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("samples/s", f"{figures['samples_per_s']:,.1f}"),
        ("step: median", f"{figures['step_s_median']:.3f} s"),
        ("step: p99", f"{figures['step_s_p99']:.3f} s"),
        ("steps of the slowest client", str(figures["steps_least"])),
        ("steps of the fastest client", str(figures["steps_most"])),
        ("resident memory of the server", f"{figures['memory_mib_median']:,.0f} MiB"),
        ("busy responses", str(soak.waits)),
        ("repeated steps", str(soak.lost)),
        ("clients' CPU, of one core", f"{soak.client_share:.1%}"),
    ):
        table.add_row(name, value)
    return table


def _target(name: str) -> str:
    if name not in TARGETS:
        return ""
    bound, is_lower = TARGETS[name]
    return f"{'≥' if is_lower else '≤'} {bound:g}"


def _cores_caption(findings: Findings) -> str:
    cores, taken = findings.cores, findings.taken
    if cores.shared:
        return (
            "[red]Server and clients share their cores on this machine: the figures over the loop "
            "are too low.[/red]"
        )
    text = f"Server and loop on cores {list(cores.server)}, clients on {list(cores.clients)}."
    if taken is None or taken < _MAX_TAKEN:
        return text
    return (
        f"{text} [yellow]Other programs used {taken:.0%} of the loop's cores: trust the ratios of "
        "CPU time more than those of the clock.[/yellow]"
    )
