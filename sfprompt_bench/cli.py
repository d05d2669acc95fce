"""The command ``sfprompt-bench``: whole runs on one machine, measured."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup
from typer.main import get_command

from edge_client import __version__
from protocol.errors import SFPromptError
from sfprompt_bench.run.preflight import PACKAGES, check_packages


@dataclass(frozen=True)
class _Entry:
    """Where a command's function is, what its help says, and what must be installed for it."""

    module: str
    summary: str
    examples: tuple[str, ...]
    packages: tuple[str, ...] = PACKAGES


_COMMANDS = {
    "run": _Entry(
        "sfprompt_bench.run.command",
        "Tune with one server and several devices, all on this machine, and show what it took.",
        (
            "sfprompt-bench run",
            "sfprompt-bench run --data fashion-mnist --partition dirichlet:0.3 --json result.json",
        ),
    ),
    "traffic": _Entry(
        "sfprompt_bench.traffic.command",
        "Climb from the paper's form to the default, measure by measure: bytes, accuracy, time.",
        ("sfprompt-bench traffic --quick", "sfprompt-bench traffic --json traffic.json"),
    ),
    "compare": _Entry(
        "sfprompt_bench.compare.command",
        "Run every method side by side: accuracy, bytes, compute, memory, time; one report.",
        (
            "sfprompt-bench compare --quick",
            "sfprompt-bench compare docs/results/comparisons/digits.toml --out runs/digits",
        ),
        packages=(*PACKAGES, "jinja2", "psutil"),
    ),
    "estimate": _Entry(
        "sfprompt_bench.estimate.command",
        "Calculate traffic, compute and memory of a device for every method; nothing is run.",
        (
            "sfprompt-bench estimate --backbone vit_base_patch16_224 --image-size 224 "
            "--samples 1000 --rounds 50",
        ),
        packages=(),
    ),
    "engine": _Entry(
        "sfprompt_bench.engine.command",
        "Measure the split server's engine: against a plain loop, an echo, itself, and time.",
        (
            "sfprompt-bench engine --quick",
            "sfprompt-bench engine --device cuda --out engine --json engine.json",
        ),
    ),
}


class _Commands(TyperGroup):
    """Imports a command's module when the command is called.

    One that only calculates does not wait for the libraries that draw and serve, and the list of
    commands waits for none. What is taken and given are click's classes, which some versions of
    typer have of their own.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command's name and summary alone, for the list; nothing is imported."""
        return _made(cmd_name, lambda: None) if cmd_name in _COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        check_packages(_COMMANDS[str(name)].packages)
        module = importlib.import_module(_COMMANDS[str(name)].module)
        return name, _made(str(name), getattr(module, str(name))), rest


def _made(name: str, function: Callable[..., None]) -> Any:
    entry = _COMMANDS[name]
    title = "Example" if len(entry.examples) == 1 else "Examples"
    epilog = "\n\n".join([f"{title}:", *entry.examples])
    one = typer.Typer(add_completion=False, rich_markup_mode="rich")
    one.command(name, help=entry.summary, epilog=epilog)(function)
    return get_command(one)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

err = Console(stderr=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sfprompt-bench {__version__}")
        raise typer.Exit


@app.callback()
def whole_runs(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Whole runs on one machine: server and devices as processes, measured and drawn."""


def main() -> None:
    """Run the command; typed errors become a message and an exit code.

    Ctrl-C ends it with 130, which is typer's doing.
    """
    # Whoever stops this command has its server and devices stopped, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except (SFPromptError, OSError) as error:  # of a file that cannot be written, say
        err.print(f"[red]error[/red]: {escape(str(error))}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
