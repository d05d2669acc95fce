"""The command ``sfprompt-bench``."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from edge_client import __version__
from protocol.command import run_command, version_option
from sfprompt_bench.run.preflight import PACKAGES, check_packages


@dataclass(frozen=True)
class _Entry:
    """A command: its module, help and required packages."""

    module: str
    summary: str
    examples: tuple[str, ...]
    packages: tuple[str, ...] = PACKAGES


_COMMANDS = {
    "run": _Entry(
        "sfprompt_bench.run.command",
        "Tune with one server and several devices on this machine, and report bytes and accuracy.",
        (
            "sfprompt-bench run",
            "sfprompt-bench run --data fashion-mnist --partition dirichlet:0.3 --json result.json",
        ),
    ),
    "traffic": _Entry(
        "sfprompt_bench.traffic.command",
        "Run the paper's form, add one measure against traffic at a time up to the default form, "
        "and report bytes, accuracy and time of each.",
        ("sfprompt-bench traffic --quick", "sfprompt-bench traffic --json traffic.json"),
    ),
    "compare": _Entry(
        "sfprompt_bench.compare.command",
        "Run methods side by side and report accuracy, bytes, compute, memory and time.",
        (
            "sfprompt-bench compare --quick",
            "sfprompt-bench compare docs/results/comparisons/digits.toml --out runs/digits",
        ),
        packages=(*PACKAGES, "jinja2", "psutil"),
    ),
    "estimate": _Entry(
        "sfprompt_bench.estimate.command",
        "Calculate a device's traffic, compute and memory for each method, without a run.",
        (
            "sfprompt-bench estimate --backbone vit_base_patch16_224 --image-size 224 "
            "--samples 1000 --rounds 50",
        ),
        packages=(),
    ),
    "leak": _Entry(
        "sfprompt_bench.leak.command",
        "Train like the default form, and infer the labels from what the server receives.",
        ("sfprompt-bench leak", "sfprompt-bench leak --rounds 3 --json leak.json"),
    ),
    "poison": _Entry(
        "sfprompt_bench.poison.command",
        "Measure accuracy with hostile devices, for each attack and aggregation rule.",
        (
            "sfprompt-bench poison --quick",
            "sfprompt-bench poison --json poison.json --plot poison.png",
        ),
    ),
    "engine": _Entry(
        "sfprompt_bench.engine.command",
        "Measure the split server's engine: throughput, round trips, gain of batching and a soak.",
        (
            "sfprompt-bench engine --quick",
            "sfprompt-bench engine --device cuda --out engine --json engine.json",
        ),
    ),
}


class _Commands(TyperGroup):
    """Imports a command's module when the command is called.

    A calculation need not wait for the libraries that plot and serve, and the list of commands
    waits for none. Arguments and results are click's classes (`Any`: some versions of typer have
    copies of them).
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command's name and summary for the list, without an import."""
        return _command(cmd_name, lambda: None) if cmd_name in _COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        check_packages(_COMMANDS[str(name)].packages)
        module = importlib.import_module(_COMMANDS[str(name)].module)
        return name, _command(str(name), getattr(module, str(name))), rest


def _command(name: str, function: Callable[..., None]) -> Any:
    entry = _COMMANDS[name]
    title = "Example" if len(entry.examples) == 1 else "Examples"
    epilog = "\n\n".join([f"{title}:", *entry.examples])
    command = typer.Typer(add_completion=False, rich_markup_mode="rich")
    command.command(name, help=entry.summary, epilog=epilog)(function)
    return get_command(command)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def describe(
    version: Annotated[bool, version_option("sfprompt-bench", __version__)] = False,
) -> None:
    """Run, compare and measure split-federated prompt tuning on one machine."""


def main() -> None:
    """Run the command."""
    # SIGTERM raises KeyboardInterrupt, so that server and devices are stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(app)


if __name__ == "__main__":
    main()
