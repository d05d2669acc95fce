"""The subcommands that show a run at this moment and steer it."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.table import Table

from protocol.errors import InvalidField
from protocol.messages import RunView
from protocol.printable import printable
from protocol.run_state import DeviceState, RunState
from split_server.commands.runs import Connect, Json, RunId, out, with_connection

_DAY_S = 86_400.0


@with_connection
def status(connect: Connect, run: RunId, as_json: Json = False) -> None:
    """Show who is there, whom a run waits for, and when it goes on."""
    state = connect().status(run)
    if as_json:
        typer.echo(state.model_dump_json())
        return
    now = time.time()
    title = f"{state.name} ({state.id}): round {state.round} of {state.rounds}"
    for line in (title, state.summary, *_limit(state, now)):
        out.print(printable(line), highlight=False, markup=False)
    if state.devices:
        out.print(_devices(state.devices, now))


def _limit(state: RunState, now: float) -> list[str]:
    if state.closes_at is None:
        return []
    left = _span(max(0.0, state.closes_at - now))
    return [f"It goes on without those that are missing in {left}."]


def _devices(devices: tuple[DeviceState, ...], now: float) -> Table:
    table = Table("device", "state", "last heard", "images", "MB up", "MB down")
    for column in table.columns[2:]:
        column.justify = "right"
    for each in devices:
        heard = "-" if each.heard_at is None else f"{_span(max(0.0, now - each.heard_at))} ago"
        table.add_row(
            printable(each.name),
            str(each.status),
            heard,
            str(each.train_samples + each.test_samples),
            f"{each.up / 1e6:.2f}",
            f"{each.down / 1e6:.2f}",
        )
    return table


def _span(seconds: float) -> str:
    """Show a time span in its largest unit that is not below one."""
    for size, unit in ((_DAY_S, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@with_connection
def pause(connect: Connect, run: RunId, as_json: Json = False) -> None:
    """Let the open round end, and open no further one until the run is resumed."""
    _tell(connect().steer(run, "pause"), "ends its open round and then pauses", as_json)


@with_connection
def resume(connect: Connect, run: RunId, as_json: Json = False) -> None:
    """Let a paused run go on."""
    _tell(connect().steer(run, "resume"), "goes on", as_json)


@with_connection
def close_round(connect: Connect, run: RunId, as_json: Json = False) -> None:
    """End the open phase of a round now, without the devices that are missing."""
    _tell(connect().steer(run, "close-round"), "goes on without those that are missing", as_json)


def _tell(view: RunView, what: str, as_json: bool) -> None:
    out.print(
        view.model_dump_json() if as_json else f"run {view.id} {what}",
        highlight=False,
        markup=False,
        soft_wrap=as_json,
    )


@with_connection
def gc(
    connect: Connect,
    days: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Keep younger ones.")
    ] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; else you are asked.")] = False,
    as_json: Json = False,
) -> None:
    """Delete the runs that are over, with their files."""
    client, limit = connect(), time.time() - days * _DAY_S
    over = [run for run in client.runs() if (run.finished_at or limit + 1) <= limit]
    if not as_json:
        for run in over:
            ago = _span(time.time() - (run.finished_at or 0.0))
            line = f"{run.id}  {run.settings.name}  {run.status} {ago} ago"
            out.print(printable(line), highlight=False, markup=False)
    if not over and not as_json:
        out.print("nothing to delete")
    if over and not yes:
        if as_json:
            raise InvalidField("deletion must be confirmed", field="yes", hint="add --yes")
        typer.confirm(f"delete {len(over)} runs? export their models first", abort=True)
    for run in over:
        client.delete_run(run.id)
    if as_json:
        typer.echo(json.dumps({"deleted": [run.id for run in over]}))
    elif over:
        out.print(f"{len(over)} deleted")
