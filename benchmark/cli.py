"""The command ``sfprompt-bench``: whole runs on one machine, measured."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command

from protocol.errors import SFPromptError

# Where each command is, and its examples. Its module is imported when it is asked for: one that
# only calculates should not wait for the libraries that draw and serve.
_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (
        "benchmark.run_command",
        (
            "sfprompt-bench run",
            "sfprompt-bench run --data fashion-mnist --partition dirichlet:0.3 --json result.json",
        ),
    ),
    "traffic": (
        "benchmark.traffic.command",
        ("sfprompt-bench traffic --quick", "sfprompt-bench traffic --json traffic.json"),
    ),
    "compare": (
        "benchmark.compare.command",
        (
            "sfprompt-bench compare --quick",
            "sfprompt-bench compare docs/comparisons/digits.toml --out runs/digits",
        ),
    ),
    "estimate": (
        "benchmark.estimate.command",
        (
            "sfprompt-bench estimate --backbone vit_base_patch16_224 --image-size 224 "
            "--samples 1000 --rounds 50",
        ),
    ),
    "engine": (
        "benchmark.engine.command",
        (
            "sfprompt-bench engine --quick",
            "sfprompt-bench engine --device cuda --out engine --json engine.json",
        ),
    ),
}


class _Commands(TyperGroup):
    """Imports a command's module when the command is asked for.

    What it takes and gives are click's classes, which some versions of typer have of their own.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        module, examples = _COMMANDS[cmd_name]
        function = getattr(importlib.import_module(module), cmd_name)
        one = typer.Typer(add_completion=False, rich_markup_mode="rich")
        title = "Example" if len(examples) == 1 else "Examples"
        one.command(cmd_name, epilog="\n\n".join([f"{title}:", *examples]))(function)
        return get_command(one)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
err = Console(stderr=True)


@app.callback()
def whole_runs() -> None:
    """Whole runs on one machine: server and devices as processes, measured and drawn."""


def main() -> None:
    """Run the command; typed errors become a message and an exit code.

    Ctrl-C ends it with 130, which is typer's doing.
    """
    # Whoever stops this command has its server and devices stopped, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except SFPromptError as error:
        err.print(f"[red]error[/red]: {error}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
