"""The command ``sfprompt-bench device``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from protocol.plan import ModelPlan
from sfprompt_bench.presets import JsonFile

_KINDS = ("numpy", "torch")

_BATCHES = (1, 16)  # the second is what devices compute together


def device(
    backbone: Annotated[
        str, typer.Option(help="Plain vision transformer of timm; its weights are random.")
    ] = "vit_small_patch14_dinov2",
    image_sizes: Annotated[
        str, typer.Option(help="Sides of the images in pixels, with commas between.")
    ] = "42,56,224",
    cut: Annotated[int, typer.Option(min=0, help="Blocks on the device.")] = 1,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Time for each library, size and batch.")
    ] = 1.5,
    json_file: JsonFile = None,
) -> None:
    """Compute a device's head with NumPy and with torch, each in its own process, on one core."""
    rows = []
    for size in (int(text) for text in image_sizes.split(",")):
        plan = ModelPlan(
            backbone=backbone,
            weights="random:0",
            image_size=size,
            cut=cut,
            prompt_at="cut",
            prompt_count=0,
            depths=1,
            rank=64,
        )
        with tempfile.TemporaryDirectory() as folder:
            files = _write_files(plan, Path(folder))
            rows += [
                {"image_size": size, "kind": k, **_run(k, plan, files, seconds)} for k in _KINDS
            ]
    Console().print(_table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps({"backbone": backbone, "cut": cut, "rows": rows}, indent=2))


def _write_files(plan: ModelPlan, folder: Path) -> tuple[Path, Path]:
    """Write head and global state as the server does."""
    from split_model.backbone.weights import open_backbone, prepare_backbone
    from split_model.checkpoints.head_file import write_head_file
    from split_model.checkpoints.state import device_shapes, initial_state, save_state

    backbone = prepare_backbone(plan, plan.weights, folder).path
    head, _ = write_head_file(plan, backbone, folder / "head.safetensors")
    state = initial_state(plan, open_backbone(backbone), seed=0)
    path = folder / "state.safetensors"
    save_state({name: state[name] for name in device_shapes(plan)}, path)
    return head, path


def _run(kind: str, plan: ModelPlan, files: tuple[Path, Path], seconds: float) -> dict[str, Any]:
    batches = ",".join(map(str, _BATCHES))
    arguments = [kind, plan.model_dump_json(), *map(str, files), batches, str(seconds)]
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    finished = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "sfprompt_bench.device.worker", *arguments],
        env={**os.environ, **one_thread},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="A device's head, one core", title_justify="left")
    columns = ["pixels", "library", "load s", "peak MB"]
    columns += [f"samples/s at {batch}" for batch in _BATCHES]
    for name in columns:
        table.add_column(name, justify="left" if name == "library" else "right")
    for row in rows:
        speeds = [f"{figures['samples_per_s']:,.0f}" for figures in row["batches"]]
        table.add_row(
            str(row["image_size"]),
            row["kind"],
            f"{row['loaded_s']:.2f}",
            f"{row['peak_mb']:.0f}",
            *speeds,
        )
    return table
