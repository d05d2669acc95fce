"""``split-server export``: a run's tuned model in the format of the user's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import InvalidField
from split_model.checkpoints.export_format import ExportFormat, choose_format
from split_server.commands.runs import DATA_DIR, DataDir, RunId, out
from split_server.storage.data_dir import database_in


def export(
    run: RunId,
    destination: Annotated[
        Path,
        typer.Option(
            "--out", help="NAME.safetensors, NAME.onnx, NAME.pt2, or a folder in timm's format."
        ),
    ],
    kind: Annotated[
        ExportFormat | None,
        typer.Option("--format", help="Checked against the name. Default: as the name ends."),
    ] = None,
    round_: Annotated[
        str,
        typer.Option(
            "--round",
            metavar="newest|best|N",
            help="best: the round of the highest accuracy on held-out images.",
        ),
    ] = "newest",
    data_dir: DataDir = DATA_DIR,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
) -> None:
    """Write a run's complete tuned model, and its card. Needs no running server."""
    chosen = choose_format(destination, kind)
    if destination.exists() and not force:
        raise InvalidField(
            "the file exists",
            field="out",
            value=str(destination),
            hint="choose another name, or replace it with --force",
        )
    database_in(data_dir)
    # Imported here: torch takes seconds to import, which no other command needs.
    from split_server.federation.export import export_run
    from split_server.federation.model_card import card_path

    export_run(data_dir, run, destination, chosen, round_)
    size = f"({_size(destination) / 1e6:.1f} MB)"
    card = card_path(destination, chosen)
    out.print(f"{destination} {size}", highlight=False, markup=False)
    out.print(f"{card}, its card", highlight=False, markup=False)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
