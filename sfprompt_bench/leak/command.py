"""The command ``sfprompt-bench leak``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from sfprompt_bench.presets import JsonFile, preset_named, with_changes
from sfprompt_bench.run.preflight import check_packages

if TYPE_CHECKING:
    from sfprompt_bench.leak.measurement import LeakResult

CODECS = ("int4", "int8", "float32")

_HELD_OUT = 0.2

_PROMPTS = {"split_epochs": 1, "keep_fraction": 1.0, "prompt_count": 5}


def leak(
    data: Annotated[str, typer.Option(help="Preset: digits | fashion-mnist")] = "digits",
    samples: Annotated[int, typer.Option(min=10, help="Training images of the device.")] = 360,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds, at most those of the preset. Each is attacked.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Train like the default form with prompts, and infer the labels from what the server receives.

    One device trains in one process, through the codecs of the wire, once for each codec of the
    gradients. The server knows the features that it sent, the sums and gradients that it received
    and the tail of each round's global state.
    """
    check_packages()
    settings = with_changes(preset_named(data).settings, {"method": _PROMPTS})
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from edge_client.data.dataset import limit_per_set
    from edge_client.data.sources import load_dataset, parse_source
    from sfprompt_bench.leak.measurement import measure_leak

    source = load_dataset(parse_source(data), held_out=_HELD_OUT, seed=seed)
    images = limit_per_set(source, train=samples, seed=seed)
    rounds = min(rounds, settings.federation.rounds)
    results: list[LeakResult] = []
    console = Console()
    with console.status("training …") as status:
        for codec in CODECS:
            changed = with_changes(settings, {"wire": {"gradients": codec}})
            for result in measure_leak(changed.model_copy(update={"seed": seed}), images, rounds):
                status.update(f"gradients in {codec}: round {result.round} of {rounds}")
                if result not in results:  # round 0 is the same for all
                    results.append(result)
    console.print(_table(results, data))
    if json_file is not None:
        values = [dataclasses.asdict(result) for result in results]
        json_file.write_text(json.dumps(values, indent=2) + "\n")


def _table(results: list[LeakResult], data: str) -> Table:
    table = Table(
        title=f"Labels that the server infers, of {results[0].samples} images of {data} a round",
        title_justify="left",
        caption="chance: the same against random labels",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("gradients")
    for name in ("round", "least squares", "chance", "by clusters", "chance"):
        table.add_column(name, justify="right")
    for result in results:
        shares = (
            result.by_least_squares,
            result.by_least_squares_random,
            result.by_clusters,
            result.by_clusters_random,
        )
        shown = ("" if share is None else f"{share:.1%}" for share in shares)
        table.add_row(result.gradients or "(sums)", str(result.round), *shown)
    return table
