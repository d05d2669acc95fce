"""What the project's commands share: the option ``--version``, and the form of their errors."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from protocol.errors import SFPromptError

__all__ = ["run_command", "version_option"]


def version_option(command: str, version: str) -> Any:
    """Return the option ``--version``: print the command's name and version, and exit."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{command} {version}")
            raise typer.Exit

    return typer.Option(
        "--version", callback=show, is_eager=True, help="Show the version and exit."
    )


def run_command(app: typer.Typer) -> None:
    """Run a command; a typed error becomes one line on stderr and exit code 2.

    typer turns Ctrl-C into exit code 130.
    """
    try:
        app()
    except (SFPromptError, OSError) as error:  # OSError: of a file or a port
        # A file's name may be no valid text, which no terminal takes.
        text = str(error).encode("utf-8", "backslashreplace").decode()
        Console(stderr=True).print(
            f"[red]error[/red]: {escape(text)}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
