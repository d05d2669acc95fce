"""The command ``sfprompt-bench leak``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from edge_client.data import Dataset, limit_per_set, load_dataset, parse_source
from protocol.settings import RunSettings
from sfprompt_bench.leak.attacks import (
    cluster_directions,
    infer_from_sums,
    infer_labels,
    purity,
)
from sfprompt_bench.leak.rounds import ObservedRound, observe_rounds
from sfprompt_bench.leak.start import ObservedStart, observe_start
from sfprompt_bench.methods.base import with_changes
from sfprompt_bench.methods.pooled import PooledModel
from sfprompt_bench.presets import JsonFile, preset_named

CODECS = ("int4", "int8", "float32")

_HELD_OUT = 0.2

_PROMPTS = {"split_epochs": 1, "keep_fraction": 1.0, "prompt_count": 5}


@dataclass(frozen=True)
class LeakResult:
    """Shares of one round's labels that the server infers, and of random labels for comparison.

    Attributes:
        gradients: their codec; None: round 0, from the sums in each class.
        round: its number.
        samples: number of labels.
        by_least_squares: from gradients with the tail of the round's global state, or from sums.
        by_least_squares_random: of random labels.
        by_clusters: purity of clusters of the gradients' directions, without the tail.
        by_clusters_random: of random labels.
    """

    gradients: str | None
    round: int
    samples: int
    by_least_squares: float
    by_least_squares_random: float
    by_clusters: float | None = None
    by_clusters_random: float | None = None


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
    settings = with_changes(preset_named(data).settings, {"method": _PROMPTS})
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


def measure_leak(settings: RunSettings, data: Dataset, rounds: int) -> Iterator[LeakResult]:
    """Train ``rounds`` rounds of one device with all training images, and attack each.

    A run that starts in closed form has a round 0 before them.

    Raises:
        InvalidField: the server does not tune the prompts, or the model cannot be obtained.
    """
    plan = settings.plan
    model, basis = PooledModel(plan, data), None
    if plan.model.depths:
        basis, start = observe_start(model, plan)
        yield attack_start(start, plan.seed)
    for observed in observe_rounds(model, plan, rounds, basis):
        yield attack_round(observed, plan.wire.gradients, plan.model.num_classes, plan.seed)


def attack_start(observed: ObservedStart, seed: int) -> LeakResult:
    """Infer the labels of round 0; ``seed`` is that of the random labels."""
    inferred = infer_from_sums(observed.features, observed.sums, observed.counts)
    random = _shuffled(observed.labels, seed)
    return LeakResult(
        gradients=None,
        round=0,
        samples=len(inferred),
        by_least_squares=_share(inferred == observed.labels),
        by_least_squares_random=_share(inferred == random),
    )


def attack_round(observed: ObservedRound, codec: str, classes: int, seed: int) -> LeakResult:
    """Infer the labels of a round, with its tail and without.

    Args:
        observed: the round.
        codec: of the gradients, for the result.
        classes: their number.
        seed: of the clusters and of the random labels.
    """
    labels = observed.labels
    random = _shuffled(labels, seed)
    inferred = infer_labels(observed.tail, observed.features, observed.gradients)
    clusters = cluster_directions(observed.gradients, classes, seed)
    return LeakResult(
        gradients=codec,
        round=observed.number,
        samples=len(labels),
        by_least_squares=_share(inferred == labels),
        by_least_squares_random=_share(inferred == random),
        by_clusters=purity(clusters, labels),
        by_clusters_random=purity(clusters, random),
    )


def _shuffled(labels: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return labels[torch.randperm(len(labels), generator=generator)]


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


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
