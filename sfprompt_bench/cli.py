"""The command ``sfprompt-bench``."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from protocol.command import Subcommand, group_of, run_command, version_option

_SUBCOMMANDS = {
    "run": Subcommand(
        "sfprompt_bench.run.command",
        "Tune with one server and several devices on this machine, and report bytes and accuracy.",
        (
            "sfprompt-bench run",
            "sfprompt-bench run --data folder:photos --devices 3",
            "sfprompt-bench run --data fashion-mnist --partition dirichlet:0.3 --json result.json",
        ),
    ),
    "traffic": Subcommand(
        "sfprompt_bench.traffic.command",
        "Run the paper's form, add one measure against traffic at a time up to the default form, "
        "and report bytes, accuracy and time of each.",
        ("sfprompt-bench traffic --quick", "sfprompt-bench traffic --json traffic.json"),
    ),
    "compare": Subcommand(
        "sfprompt_bench.compare.command",
        "Run methods side by side and report accuracy, bytes, compute, memory and time.",
        (
            "sfprompt-bench compare --quick",
            "sfprompt-bench compare docs/results/comparisons/digits.toml --out runs/digits",
        ),
    ),
    "dominate": Subcommand(
        "sfprompt_bench.dominate.command",
        "Measure the default form and other methods over data sets, sizes and partitions, and "
        "judge in each who is first.",
        (
            "sfprompt-bench dominate --quick",
            "sfprompt-bench dominate --cells 'digits-*' --methods sfprompt,ridge-depths",
        ),
    ),
    "random": Subcommand(
        "sfprompt_bench.random_runs.command",
        "Run the default form with random settings, and report runs that end below their start.",
        ("sfprompt-bench random --count 3", "sfprompt-bench random --count 100 --csv runs.csv"),
    ),
    "estimate": Subcommand(
        "sfprompt_bench.estimate.command",
        "Calculate a device's traffic, compute and memory for each method, without a run.",
        (
            "sfprompt-bench estimate --backbone vit_base_patch16_224 --image-size 224 "
            "--samples 1000 --rounds 50",
        ),
    ),
    "device": Subcommand(
        "sfprompt_bench.device.command",
        "Compute a device's head with NumPy and with torch: samples a second, memory, start.",
        (
            "sfprompt-bench device",
            "sfprompt-bench device --backbone vit_base_patch16_224 --image-sizes 224",
        ),
    ),
    "leak": Subcommand(
        "sfprompt_bench.leak.command",
        "Train like the default form, and infer the labels from what the server receives.",
        ("sfprompt-bench leak", "sfprompt-bench leak --rounds 3 --json leak.json"),
    ),
    "poison": Subcommand(
        "sfprompt_bench.poison.command",
        "Measure accuracy with hostile devices, for each attack and aggregation rule.",
        (
            "sfprompt-bench poison --quick",
            "sfprompt-bench poison --json poison.json --plot poison.png",
        ),
    ),
    "fuzz": Subcommand(
        "sfprompt_bench.fuzz.command",
        "Decode mutated frames and send broken requests to a server; list what goes wrong.",
        (
            "sfprompt-bench fuzz --frames 20000 --requests 2000",
            "sfprompt-bench fuzz --seed 7 --json fuzz.json",
        ),
    ),
    "soak-day": Subcommand(
        "sfprompt_bench.day.command",
        "Simulate a day with many devices that come and go, and check a server's resources.",
        ("sfprompt-bench soak-day --hours 6 --minutes 1", "sfprompt-bench soak-day"),
    ),
    "chaos": Subcommand(
        "sfprompt_bench.chaos.command",
        "Kill, cut off, duplicate, damage and delay in runs of real processes; each has to end as "
        "if nothing had happened.",
        ("sfprompt-bench chaos", "sfprompt-bench chaos --faults 1000 --seed 7 --json"),
        ("A failed run is named by its seed S. Repeat it: sfprompt-bench chaos --runs 1 --seed S",),
    ),
    "engine": Subcommand(
        "sfprompt_bench.engine.command",
        "Measure the split server's engine: throughput, round trips, gain of batching and a soak.",
        (
            "sfprompt-bench engine --quick",
            "sfprompt-bench engine --device cuda --out engine --json engine.json",
        ),
    ),
}


app = typer.Typer(
    cls=group_of(_SUBCOMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def describe(
    version: Annotated[bool, version_option("sfprompt-bench")] = False,
) -> None:
    """Run, compare and measure split-federated prompt tuning on one machine."""


def main() -> None:
    """Run the command."""
    # SIGTERM raises KeyboardInterrupt, so that server and devices are stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(app)


if __name__ == "__main__":
    main()
