"""An exported model in the formats of other programs: timm, ONNX and torch.export.

Each function writes a file or a folder, runs what it wrote, and compares its logits with those of
the model, so that a file that computes something else is never left behind.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protocol.errors import InternalError, InvalidField
from split_model.backbone.architecture import create
from split_model.backbone.libraries import timm
from split_model.checkpoints.export import ExportedModel
from split_model.checkpoints.export_format import ExportFormat
from split_model.files import write_durably
from split_model.parts.base import Part

_TOLERANCE = 1e-3  # of a logit, relative to the largest one

_EXAMPLES = 2  # a dimension of 1 would be exported as a constant

_CHECKED = 3  # images in the check, another number than in the export

_MAX_BATCH = 65_536

IMAGES, LOGITS = "images", "logits"  # names of the graph's input and output


def write_onnx(model: ExportedModel, out: Path) -> None:
    """Write a model as an ONNX graph from images [B, 3, S, S] to logits [B, C], for any B.

    The image preparation and the class names are in its metadata.

    Raises:
        InvalidField: a package is missing.
        InternalError: ONNX Runtime computes other logits.
    """
    runtime = _optional("onnxruntime")
    _optional("onnxscript")
    with _quiet():
        program: Any = torch.onnx.export(
            model,
            (_images(model, _EXAMPLES),),
            dynamo=True,
            dynamic_shapes=({0: _batch()},),
            input_names=[IMAGES],
            output_names=[LOGITS],
            verbose=False,
        )
    program.model.metadata_props.update(_description(model))

    def save(path: Path) -> None:
        program.save(str(path), external_data=False)
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        images = _images(model, _CHECKED)
        (logits,) = session.run([LOGITS], {IMAGES: images.numpy()})
        _compare(model, images, torch.from_numpy(logits), out)

    write_durably(out, save)


def write_program(model: ExportedModel, out: Path) -> None:
    """Write a model for `torch.export.load`, from images [B, 3, S, S] to logits [B, C].

    The image preparation and the class names are its extra file ``model.json``.

    Raises:
        InternalError: the loaded program computes other logits.
    """
    with _quiet():
        program = torch.export.export(
            model, (_images(model, _EXAMPLES),), dynamic_shapes=({0: _batch()},)
        )

    def save(path: Path) -> None:
        # torch writes to a path only if it ends in .pt2
        with path.open("wb") as file, _quiet():
            extra = {"model.json": json.dumps(_description(model))}
            torch.export.save(program, file, extra_files=extra)
        with path.open("rb") as file, _quiet():
            loaded = torch.export.load(file).module()
        images = _images(model, _CHECKED)
        with torch.no_grad():
            _compare(model, images, loaded(images), out)

    write_durably(out, save)


def write_timm(model: ExportedModel, out: Path) -> None:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    Raises:
        InvalidField: timm has no model that computes this one.
        InternalError: the loaded model computes other logits.
    """
    plan = model.settings
    whole = create(plan, plan.num_classes)
    whole.load_state_dict(_timm_tensors(model, whole))
    names = list(model.class_names)
    config: dict[str, Any] = {
        "architecture": plan.backbone.split(".", 1)[0],
        "num_classes": plan.num_classes,
        "model_args": {"img_size": plan.image_size, **dict(plan.model_overrides)},
        **({"label_names": names} if names else {}),
    }
    side = plan.image_size
    data = {
        "input_size": (3, side, side),
        "mean": model.preparation.mean,
        "std": model.preparation.std,
        "interpolation": model.preparation.interpolation,
        "crop_pct": 1.0,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        written = Path(folder) / out.name
        timm.models.save_for_hf(
            whole,
            written,
            model_config=config,
            safe_serialization=True,
            data_config=data,
        )
        loaded = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
        images = _images(model, _CHECKED)
        with torch.no_grad():
            _compare(model, images, loaded(images), out)
        if out.exists():
            shutil.rmtree(out)
        written.rename(out)


def _timm_tensors(model: ExportedModel, whole: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors by timm's names.

    Raises:
        InvalidField: it has parts that timm's model has not.
    """
    plan = model.settings
    parts: list[Part] = [model.head, model.body, model.tail]
    tensors = {name: part.state_dict()[key] for part in parts for name, key in part.names().items()}
    expected = whole.state_dict()
    extra = sorted(set(tensors) - set(expected))
    reasons = {
        "soft prompts": plan.prompt_count > 0,
        "a tail that reads several blocks": plan.depths > 0,
        "merged tokens": plan.keep_tokens > 0,
        "fewer blocks or narrower MLPs": plan.is_reshaped,
        f"further tensors such as {extra[:1]}": bool(extra),
    }
    found = [name for name, applies in reasons.items() if applies]
    if found:
        raise InvalidField(
            f"the model has {', '.join(found)}, which no model of timm has",
            field="format",
            limit=[each.value for each in ExportFormat if each != ExportFormat.TIMM],
            value=ExportFormat.TIMM.value,
            hint="export it as .onnx, .pt2 or .safetensors",
        )
    return {name: tensors[name] for name in expected}


def _compare(model: ExportedModel, images: Tensor, logits: Tensor, out: Path) -> None:
    with torch.no_grad():
        expected: Tensor = model(images)
    difference = (logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference <= _TOLERANCE:  # NaN is refused, too
        raise InternalError(
            f"the exported model differs from the tuned one and was not written to {out}",
            field="format",
            limit=_TOLERANCE,
            value=float(difference),
        )


def _images(model: ExportedModel, count: int) -> Tensor:
    """Return seeded noise [count, 3, S, S] as prepared images."""
    side = model.settings.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def _batch() -> Any:
    return torch.export.Dim("batch", min=1, max=_MAX_BATCH)


def _description(model: ExportedModel) -> dict[str, str]:
    preparation = model.preparation
    return {
        "class_names": json.dumps(list(model.class_names)),
        "image_size": str(model.settings.image_size),
        "mean": json.dumps(list(preparation.mean)),
        "std": json.dumps(list(preparation.std)),
        "interpolation": preparation.interpolation,
    }


def _optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InvalidField(
            f"the export needs the package {package}",
            field="format",
            value=ExportFormat.ONNX.value,
            hint='install the extra, from a checkout: pip install ".[export]"',
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters say about their own code."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        log.setLevel(level)
