"""Shared parts of the project's commands: subcommands, ``--version`` and error messages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.main import get_command

from protocol.errors import InvalidField, SFPromptError
from protocol.printable import printable_lines

__all__ = ["Subcommand", "group_of", "read_token_file", "run_command", "version_option"]


@dataclass(frozen=True)
class Subcommand:
    """A subcommand whose module is imported when it is called.

    Attributes:
        module: module with a function of the subcommand's name, with ``_`` for ``-``.
        summary: summary in the help text.
        examples: command lines in the help text.
        notes: paragraphs after the examples.
    """

    module: str
    summary: str
    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def build(self, name: str, function: Callable[..., None]) -> Any:
        """Build the click command of a function, whose parameters become options."""
        title = "Example" if len(self.examples) == 1 else "Examples"
        shown = [f"{title}:", *self.examples] if self.examples else []
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        app.command(name, help=self.summary, epilog="\n\n".join([*shown, *self.notes]))(function)
        return get_command(app)

    def load(self, name: str) -> Any:
        """Import the module and build the command."""
        module = importlib.import_module(self.module)
        return self.build(name, getattr(module, name.replace("-", "_")))


class _Group(TyperGroup):
    """Imports the module of a subcommand when it is called.

    Arguments and results are click's classes, typed `Any` because some versions of typer have
    copies of them.
    """

    subcommands: ClassVar[Mapping[str, Subcommand]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.subcommands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with name and summary only, without an import."""
        entry = self.subcommands.get(cmd_name)
        return None if entry is None else entry.build(cmd_name, lambda: None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, self.subcommands[str(name)].load(str(name)), rest


def group_of(subcommands: Mapping[str, Subcommand]) -> type[TyperGroup]:
    """Return the class of a command with these subcommands, for ``typer.Typer(cls=...)``.

    Listing the subcommands imports no module, and calling one imports only its own module.
    """
    return type("Group", (_Group,), {"subcommands": subcommands})


def version_option(command: str) -> Any:
    """Return the option ``--version``, which prints the command's name and version and exits."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{command} {_installed_version()}")
            raise typer.Exit

    return typer.Option(
        "--version", callback=show, is_eager=True, help="Show the version and exit."
    )


def read_token_file(path: Path, field: str) -> str:
    """Read a token from a file, so that no list of processes shows it.

    Args:
        path: of the file; spaces and lines around the token are dropped.
        field: the option's name, for errors.

    Raises:
        InvalidField: the file cannot be read or is empty.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(
            "the file of a token cannot be read", field=field, value=str(error)
        ) from None
    if not token:
        raise InvalidField("the file of a token is empty", field=field, value=str(path))
    return token


def run_command(app: typer.Typer) -> None:
    """Run a command. A typed error is printed as one line on stderr, with exit code 2.

    With Ctrl-C the exit code is 130.
    """
    try:
        app()
    except KeyboardInterrupt:  # outside of typer's own handler
        sys.exit(130)
    except (SFPromptError, OSError) as error:  # OSError: a file or a port cannot be opened
        from rich.console import Console
        from rich.markup import escape

        text = escape(printable_lines(str(error)))  # a server's words, or a file's strange name
        Console(stderr=True).print(f"[red]error[/red]: {text}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sfprompt")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"
