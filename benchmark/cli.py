"""The command ``sfprompt-bench``: whole runs on one machine, measured."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmark.compare.command import compare
from benchmark.engine.command import engine
from benchmark.estimate import Question, estimate_report, estimate_table
from benchmark.estimate import estimate as calculate
from benchmark.local_run import LocalRun
from benchmark.preflight import check_disk, check_packages
from benchmark.presets import PRESETS, preset_named, traffic_preset
from benchmark.processes import usable_cores
from benchmark.report import result_table, write_files
from benchmark.traffic import (
    Setting,
    climb,
    ladder,
    large_table,
    phase_table,
    plot_ladder,
    traffic_figures,
    traffic_table,
)
from edge_client.data import DataError
from edge_client.data.partition import SCHEMES
from protocol.errors import SFPromptError
from protocol.forms import FORMS, Form
from protocol.messages import parse_message
from protocol.settings import RunSettings
from split_server.model_files import model_errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Whole runs on one machine: server and devices as processes, measured and drawn.",
)
err = Console(stderr=True)
FormOption = Annotated[
    Form,
    typer.Option(help="default: prompts at the cut, little traffic; paper: as it was published."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]


@app.command(
    epilog="Examples:\n\nsfprompt-bench run\n\n"
    "sfprompt-bench run --data fashion-mnist --partition dirichlet:0.3 --json result.json"
)
def run(
    data: Annotated[
        str, typer.Option(help=f"Data set, with its settings: {' | '.join(PRESETS)}")
    ] = "digits",
    form: FormOption = "default",
    devices: Annotated[int, typer.Option(min=1, max=64, help="Edge clients to start.")] = 4,
    partition: Annotated[str, typer.Option(help=f"How the data are divided: {SCHEMES}")] = "iid",
    rounds: Annotated[int | None, typer.Option(min=1, help="Default: the preset's.")] = None,
    keep_fraction: Annotated[
        float | None, typer.Option(help="Share of samples kept for split training.")
    ] = None,
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Training images over all devices.")
    ] = None,
    limit_test: Annotated[
        int | None, typer.Option(min=1, help="Test images over all devices.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Training images of each class over all devices, instead."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the data's parts and all draws.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    server_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the body. Default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/DATA-TIME.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Tune with one server and several devices, all on this machine, and show what it took."""
    console = Console()
    check_packages()
    preset = preset_named(data, form)
    folder = out or Path("runs") / f"{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder)
    local = LocalRun(
        settings=_adjusted(preset.settings, devices, rounds, keep_fraction, seed),
        data=preset.data,
        devices=devices,
        partition=partition,
        folder=folder,
        port=port,
        server_threads=server_threads,
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


@app.command(
    epilog="Examples:\n\nsfprompt-bench traffic --quick\n\n"
    "sfprompt-bench traffic --json traffic.json"
)
def traffic(
    quick: Annotated[
        bool, typer.Option("--quick", help="A small setting on the digits, in minutes.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Edge clients of a run. Default: 4, or 2 with --quick."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Again for more. Default: 0, 1 and 2.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="The line of each device that is simulated.")
    ] = "20mbit,50ms",
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one for each CPU core.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; runs found there are not repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Climb from the paper's form to the default, measure by measure: bytes, accuracy, time."""
    console = Console()
    check_packages()
    folder = out or Path("runs") / f"traffic-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder)
    paper, default = (traffic_preset(form, quick=quick) for form in FORMS[::-1])
    seeds = tuple(seed or ((0,) if quick else (0, 1, 2)))
    setting = Setting(
        default, devices or (2 if quick else 4), seeds, link, at_once or usable_cores()
    )
    rungs = ladder(paper.settings, default.settings)
    climbs = climb(rungs, setting, folder, console)
    for rung in rungs:
        console.print(f"  [bold]{rung.name}[/bold]: {rung.what}", highlight=False)
    console.print(phase_table(climbs, setting))
    console.print(traffic_table(climbs, setting))
    console.print(large_table(default.settings))
    console.print(f"  {plot_ladder(climbs, setting, folder / 'traffic.png')}", highlight=False)
    if json_file is not None:
        figures = traffic_figures(climbs, setting)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


app.command(
    epilog="Examples:\n\nsfprompt-bench compare --quick\n\n"
    "sfprompt-bench compare docs/comparisons/digits.toml --out runs/digits"
)(compare)


@app.command(
    epilog="Example:\n\nsfprompt-bench estimate --backbone vit_base_patch16_224 --image-size 224 "
    "--samples 1000 --rounds 50"
)
def estimate(
    backbone: Annotated[
        str, typer.Option(help="timm's name of the model; no weights are needed.")
    ] = "vit_small_patch14_dinov2",
    image_size: Annotated[int, typer.Option(min=8, max=2048, help="Pixels a side.")] = 224,
    classes: Annotated[int, typer.Option(min=2)] = 10,
    samples: Annotated[int, typer.Option(min=1, help="Training images of a device.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1)] = 50,
    local_epochs: Annotated[
        int, typer.Option(min=1, help="Of a round, in methods that train the whole model locally.")
    ] = 10,
    cut: Annotated[int, typer.Option(min=0, help="Blocks in the head.")] = 1,
    keep_fraction: Annotated[
        float | None, typer.Option(help="Share of samples kept for split training.")
    ] = None,
    keep_tokens: Annotated[
        int, typer.Option(min=0, help="Image tokens that cross the cut, merged; 0: all.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Calculate traffic, compute and memory of a device for every method, in a second."""
    values = preset_named("fashion-mnist").settings.model_dump()
    values["class_names"] = None
    values["model"] |= {
        "backbone": backbone,
        "image_size": image_size,
        "num_classes": classes,
        "cut": cut,
        "keep_tokens": keep_tokens,
    }
    values["federation"] |= {"rounds": rounds, "evaluate_every": 0}
    if keep_fraction is not None:
        values["training"]["keep_fraction"] = keep_fraction
    question = Question(parse_message(RunSettings, values), samples, local_epochs=local_epochs)
    with model_errors():
        costs = calculate(question)
    Console().print(estimate_table(question, costs))
    if json_file is not None:
        json_file.write_text(json.dumps(estimate_report(question, costs), indent=2) + "\n")


app.command(
    epilog="Examples:\n\nsfprompt-bench engine --quick\n\n"
    "sfprompt-bench engine --device cuda --out engine --json engine.json"
)(engine)


def _adjusted(
    settings: RunSettings, devices: int, rounds: int | None, keep: float | None, seed: int
) -> RunSettings:
    """The preset with what the command line changes; validated again as a whole."""
    values = settings.model_dump()
    values["seed"] = seed
    values["federation"]["min_participants"] = devices
    if rounds is not None:
        values["federation"]["rounds"] = rounds
    if keep is not None:
        values["training"]["keep_fraction"] = keep
    return parse_message(RunSettings, values)


def main() -> None:
    """Run the command; typed errors become a message and an exit code.

    Ctrl-C ends it with 130, which is typer's doing.
    """
    # Whoever stops this command has its server and devices stopped, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except (SFPromptError, DataError) as error:
        err.print(f"[red]error[/red]: {error}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
