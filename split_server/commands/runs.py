"""The subcommands of ``split-server`` with which an operator manages runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protocol.command import read_token_file
from protocol.errors import InvalidField, NotFound, SFPromptError
from protocol.messages import (
    Event,
    ParticipantView,
    Results,
    RoundView,
    RunView,
    parse_message,
)
from protocol.presets import Form, over_form
from protocol.printable import printable
from protocol.settings import RunSettings
from protocol.traffic import total_bytes
from split_server.address import Address, read_address
from split_server.client import OperatorClient, read_token
from split_server.settings import read_toml

out = Console()

DataDir = Annotated[
    Path,
    typer.Option("--data-dir", help="The server's data folder.", envvar="SPLIT_SERVER_DATA_DIR"),
]

Url = Annotated[
    str | None,
    typer.Option("--url", help="Address of the server. Default: as in its data folder."),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

TokenOption = Annotated[
    str | None,
    typer.Option(
        "--operator-token",
        envvar="SPLIT_SERVER_OPERATOR_TOKEN",
        help="Default: that in the data folder. The list of processes shows it to others.",
    ),
]

TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--operator-token-file",
        envvar="SPLIT_SERVER_OPERATOR_TOKEN_FILE",
        help="File with the operator token.",
    ),
]

CaFile = Annotated[
    Path | None,
    typer.Option("--ca-file", help="PEM file of trusted certificates, for https with --url."),
]

RunId = Annotated[str, typer.Argument(help="The run's id.")]

DATA_DIR = Path("sfprompt-data")

_ID_WIDTH = 18  # letters of the longest ids

_WATCH_S = 5  # of a poll for events; then for whom the run waits is asked


def _connect(
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    operator_token: TokenOption = None,
    operator_token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> OperatorClient:
    address = read_address(data_dir) if url is None else Address(url)
    client = OperatorClient(address.url, ca_file=ca_file or address.ca_file)
    try:  # only now: a wrong address is told before a missing token
        if operator_token is None and operator_token_file is not None:
            operator_token = read_token_file(operator_token_file, "operator_token_file")
        client.authenticate(operator_token or read_token(data_dir))
    except BaseException:
        client.close()
        raise
    return client


Connect = Callable[[], OperatorClient]


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``connect`` by the options of `_connect`.

    The command calls ``connect`` for a client, which is closed when the command ends.
    """
    connection = inspect.signature(_connect, eval_str=True).parameters
    parameters = inspect.signature(command, eval_str=True).parameters
    others = [parameter for name, parameter in parameters.items() if name != "connect"]

    @functools.wraps(command)
    def connected(**values: Any) -> None:
        options = {name: values.pop(name) for name in connection}
        with contextlib.ExitStack() as stack:

            def connect() -> OperatorClient:
                return stack.enter_context(contextlib.closing(_connect(**options)))

            command(connect=connect, **values)

    signature = inspect.Signature([*others, *connection.values()])
    connected.__signature__ = signature  # type: ignore[attr-defined]
    return connected


@with_connection
def create_run(
    connect: Connect,
    config: Annotated[Path | None, typer.Option(help="TOML file with the run's settings.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, SECTION.NAME=VALUE; overrides the file."),
    ] = None,
    form: Annotated[
        Form,
        typer.Option(
            help="The values of all other settings. default: prompts at the cut, "
            "little traffic; paper: as published."
        ),
    ] = "default",
    key: Annotated[
        str | None,
        typer.Option(
            help="Names this creation: a repetition with the same key finds the same run."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a run for devices to join."""
    values = over_form(form, _run_settings(config, changes or []))
    settings = parse_message(RunSettings, values)
    run = connect().create_run(settings, key, _show_waiting)
    if as_json:
        typer.echo(run.model_dump_json())
    else:
        out.print(f"run [bold]{run.id}[/bold] ({run.settings.name}) waits for participants")


def _show_waiting(error: SFPromptError) -> None:
    typer.echo(f"waiting: {printable(str(error))}", err=True)


@with_connection
def runs(connect: Connect, as_json: Json = False) -> None:
    """List the runs of a server."""
    views = connect().runs()
    if as_json:
        typer.echo(json.dumps([run.model_dump(mode="json") for run in views]))
        return
    table = Table()
    table.add_column("run", no_wrap=True, min_width=_ID_WIDTH)  # to be typed or copied
    for name in ("name", "status", "round", "devices", "backbone", "method"):
        table.add_column(name)
    for run in views:
        table.add_row(*_run_cells(run))
    out.print(table)


@with_connection
def watch(connect: Connect, run: RunId, as_json: Json = False) -> None:
    """Print a run's events until it is over."""
    client, after, waiting = connect(), 0, None
    while True:
        events = client.events(run, after, wait_s=_WATCH_S)
        for event in events:
            after = event.seq
            typer.echo(_event_json(event) if as_json else _event_line(event))
        if events:
            continue
        seen = client.results(run)
        if seen.run.status.is_over:
            return
        if seen.waiting is not None and seen.waiting != waiting:
            line = json.dumps({"kind": "waiting", "message": seen.waiting})
            typer.echo(line if as_json else f"waiting: {printable(seen.waiting)}")
        waiting = seen.waiting


@with_connection
def results(connect: Connect, run: RunId, as_json: Json = False) -> None:
    """Show a run's rounds: updates, losses, accuracy, traffic, and the privacy budget spent."""
    view = connect().results(run)
    if as_json:
        typer.echo(view.model_dump_json())
    else:
        out.print(_rounds_table(view))
        if view.waiting is not None:
            out.print(f"waiting: {escape(printable(view.waiting))}", highlight=False)


@with_connection
def cancel(connect: Connect, run: RunId) -> None:
    """Stop a run; its devices learn of it with their next request."""
    stopped = connect().cancel(run)
    out.print(f"run {stopped.id} is {stopped.status}")


@with_connection
def remove_device(
    connect: Connect,
    run: RunId,
    device: Annotated[str, typer.Argument(help="The device's name, or its id as p0001.")],
) -> None:
    """Remove a device from a run and revoke its credential; the run goes on without it."""
    client = connect()
    participant = _find_participant(client.results(run).participants, device)
    client.remove_participant(run, participant.id)
    text = f"{printable(participant.name)} ({participant.id}) was removed from run {run}"
    out.print(text, highlight=False, markup=False)


def _find_participant(participants: Sequence[ParticipantView], device: str) -> ParticipantView:
    """Return the participant with this id or name.

    Raises:
        NotFound: there is none.
        InvalidField: several have the name.
    """
    found = [each for each in participants if each.id == device] or [
        each for each in participants if each.name == device
    ]
    if not found:
        raise NotFound("the run has no such device", field="device", value=device)
    if len(found) > 1:
        raise InvalidField(
            "several devices of the run have this name",
            field="device",
            limit=[each.id for each in found],
            value=device,
            hint="name one by its id",
        )
    return found[0]


@with_connection
def delete(connect: Connect, run: RunId) -> None:
    """Delete the rows and files of a run that is over."""
    connect().delete_run(run)
    out.print(f"run {run} is deleted")


def _run_settings(config: Path | None, changes: list[str]) -> dict[str, Any]:
    values = {} if config is None else read_toml(config)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise InvalidField(
                "a setting is given as SECTION.NAME=VALUE", field="set", value=change
            )
        *sections, last = name.strip().split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise InvalidField(
                    f"{section} is a single setting, not a section", field="set", value=change
                )
        try:
            table[last] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[last] = text  # plain text needs no quotes
    return values


def _run_cells(run: RunView) -> tuple[str, ...]:
    model, federation = run.settings.model, run.settings.federation
    return (
        run.id,
        run.settings.name,
        str(run.status),
        f"{run.round}/{federation.rounds}",
        str(run.participants),
        model.backbone,
        run.settings.method.name,
    )


def _event_json(event: Event) -> str:
    return json.dumps(event.model_dump(mode="json"))  # in ASCII, as names are foreign


def _event_line(event: Event) -> str:
    data = "  ".join(f"{name}={value}" for name, value in event.data.items())
    return printable(f"{event.seq:>4}  {event.kind:<20}  {data}")


def _accuracy(view: RoundView, best: RoundView | None) -> str:
    """Show a round's accuracy, and whether the run has its state."""
    if view.accuracy is None:
        return "-"
    mark = " discarded" if not view.kept else " *" if view == best else ""
    return f"{view.accuracy:.2%}{mark}"


def _rounds_table(results: Results) -> Table:
    table = Table(title=f"{results.run.id} ({results.run.status})", title_justify="left")
    is_private = any(view.epsilon is not None for view in results.rounds)
    names = ["round", "status", "updates", "samples", "loss", "accuracy", "MB"]
    for name in [*names, "epsilon"] if is_private else names:
        table.add_column(name, justify="left" if name == "status" else "right")
    best = results.best
    for view in results.rounds:
        epsilon = "-" if view.epsilon is None else f"{view.epsilon:.2f}"
        nbytes = total_bytes(view.traffic)
        table.add_row(
            str(view.round) + ("" if not view.attempt else f" ({view.attempt + 1})"),
            str(view.status),
            f"{len(view.updated)}/{len(view.sampled)}",
            str(view.samples),
            "-" if view.train_loss is None else f"{view.train_loss:.4f}",
            _accuracy(view, best),
            f"{nbytes / 1e6:.2f}",
            *([epsilon] if is_private else []),
        )
    return table
