"""The command ``sfprompt-bench estimate``."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from sfprompt_bench.presets import JsonFile, preset_named, with_changes


def estimate(
    backbone: Annotated[
        str, typer.Option(help="timm's name of the model; its weights are not needed.")
    ] = "vit_small_patch14_dinov2",
    image_size: Annotated[
        int, typer.Option(min=8, max=2048, help="Height and width of images in pixels.")
    ] = 224,
    classes: Annotated[int, typer.Option(min=2, help="Classes of the data set.")] = 10,
    samples: Annotated[int, typer.Option(min=1, help="Training images of the device.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")] = 50,
    local_epochs: Annotated[
        int,
        typer.Option(
            min=1, help="Local epochs in a round, for methods that train the whole model locally."
        ),
    ] = 10,
    cut: Annotated[int, typer.Option(min=0, help="Blocks in the head.")] = 1,
    keep_fraction: Annotated[
        float | None,
        typer.Option(help="Share of samples selected for split training. Default: each form's."),
    ] = None,
    keep_tokens: Annotated[
        int, typer.Option(min=0, help="Merge the image tokens at the cut to this number; 0: all.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Calculate a device's traffic, compute and memory for each method, without a run."""
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.cost.method_cost import Question
    from sfprompt_bench.estimate.calculator import estimate as calculate
    from sfprompt_bench.estimate.calculator import paper_training
    from sfprompt_bench.estimate.report import estimate_report, estimate_table

    method: dict[str, Any] = {"cut": cut, "keep_tokens": keep_tokens}
    paper = paper_training()
    if keep_fraction is not None:
        method["keep_fraction"] = keep_fraction
        paper = paper.model_copy(update={"keep_fraction": keep_fraction})
    preset = preset_named("fashion-mnist").settings.model_copy(update={"class_names": None})
    settings = with_changes(
        preset,
        {
            "method": method,
            "model": {"backbone": backbone, "image_size": image_size, "num_classes": classes},
            "federation": {"rounds": rounds, "evaluate_every": 0},
        },
    )
    question = Question(settings.plan, samples, local_epochs=local_epochs)
    started = time.perf_counter()
    costs = calculate(question, paper)
    seconds = time.perf_counter() - started
    console = Console()
    console.print(estimate_table(question, costs))
    console.print(f"Calculated in {seconds:.1f} s.", highlight=False)
    if json_file is not None:
        json_file.write_text(
            json.dumps(estimate_report(settings, question, costs), indent=2) + "\n"
        )
