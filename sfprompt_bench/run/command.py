"""The command ``sfprompt-bench run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_client.data.partition import SCHEMES, parse_scheme
from protocol.presets import Form
from protocol.settings import RunSettings
from sfprompt_bench.presets import (
    PRESETS,
    DTypeOption,
    JsonFile,
    with_changes,
)
from sfprompt_bench.run.choice import choose_preset
from sfprompt_bench.run.preflight import check_packages, make_run_folder

FormOption = Annotated[
    Form,
    typer.Option(
        help="Form of SFPrompt: default (prompts at the cut, little traffic) or paper (as "
        "published)."
    ),
]


def run(
    data: Annotated[
        str,
        typer.Option(
            help=f"Data set with preset settings ({' | '.join(PRESETS)}), or folder:PATH: your own "
            "images, one folder for each class."
        ),
    ] = "digits",
    image_size: Annotated[
        int | None,
        typer.Option(
            min=14, max=1024, help="Side of the model's input, in pixels. Default: the preset's."
        ),
    ] = None,
    form: FormOption = "default",
    devices: Annotated[int, typer.Option(min=1, max=64, help="Edge clients to start.")] = 4,
    partition: Annotated[
        str, typer.Option(help=f"How to divide the data between devices: {SCHEMES}")
    ] = "iid",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of the run. Default: the preset's.")
    ] = None,
    keep_fraction: Annotated[
        float | None,
        typer.Option(help="Share of samples selected for split training. Default: the preset's."),
    ] = None,
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Training images over all devices.")
    ] = None,
    limit_test: Annotated[
        int | None, typer.Option(min=1, help="Test images over all devices.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Training images of each class over all devices.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the partition and of all random numbers.")
    ] = 0,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the server; 0: any free port.")
    ] = 0,
    server_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the server's body. Default: all.")
    ] = None,
    dtype: DTypeOption = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results. Default: runs/DATA-TIME.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Tune with one server and several devices on this machine, and report bytes and accuracy."""
    check_packages()
    scheme = parse_scheme(partition)
    preset = choose_preset(data, form, image_size)
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.run.local_run import LocalRun
    from sfprompt_bench.run.report import result_table, write_files

    console = Console()
    folder = make_run_folder(out, preset.settings.name)
    local = LocalRun(
        settings=_with_options(preset.settings, devices, rounds, keep_fraction, seed),
        data=preset.data,
        devices=devices,
        partition=str(scheme),
        folder=folder,
        port=port,
        server_threads=server_threads,
        dtype=dtype,
        limit_train=limit_train or (None if shots else preset.limit_train),
        limit_test=limit_test or preset.limit_test,
        shots=shots,
    )
    results, figures = local.execute(console)
    written = write_files(results, figures, folder)
    console.print()
    console.print(result_table(results, figures))
    for path in [folder / "tuned.safetensors", *written]:
        console.print(f"  {path}", highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def _with_options(
    settings: RunSettings, devices: int, rounds: int | None, keep_fraction: float | None, seed: int
) -> RunSettings:
    """The preset with the options of the command line, validated as a whole."""
    federation = {"min_participants": devices} | ({} if rounds is None else {"rounds": rounds})
    method = {} if keep_fraction is None else {"keep_fraction": keep_fraction}
    seeded = settings.model_copy(update={"seed": seed})
    return with_changes(seeded, {"federation": federation, "method": method})
