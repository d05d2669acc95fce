"""Distil smaller replacements for blocks once, and cache them in the server's data folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import split_model
from protocol.distillation import DistillationSettings
from protocol.errors import InvalidField
from protocol.plan import ModelPlan, RunPlan
from protocol.seeds import derive_seed
from split_model import BackboneFile
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.files import sha256_of

log = logging.getLogger(__name__)

IMAGES = "distillation"  # folder in the server's data folder with the image files

Distil = Callable[
    [ModelPlan, Mapping[str, Tensor], Tensor, DistillationSettings, int], dict[str, Tensor]
]


def distil_once(
    plan: RunPlan,
    backbone: BackboneFile,
    cache_dir: Path,
    shape: tuple[str, ...],
    distil: Distil,
) -> Path:
    """Return the cached file of a distillation; distil it if it is not cached.

    Args:
        shape: names of the settings that decide the result's shape.
    """
    split, file = plan.model, None
    if plan.distillation.epochs and plan.distillation.images != "random":
        file = image_file(plan, cache_dir)
    key = _cache_key(plan, split, backbone, shape, file)
    path = cache_dir / f"proxy-{key[:32]}.safetensors"
    if path.is_file():
        return path
    log.info("distilling %s from %s", path.stem, split.backbone)
    images = load_images(plan, split, file)
    seed = derive_seed(plan.seed, "proxy")
    teacher = split_model.open_backbone(backbone.path)
    weights = distil(split, teacher, images, plan.distillation, seed)
    write_tensors(path, weights, {"backbone": split.backbone})
    log.info("%s is ready", path.stem)
    return path


def _cache_key(
    plan: RunPlan,
    split: ModelPlan,
    backbone: BackboneFile,
    shape: tuple[str, ...],
    file: Path | None,
) -> str:
    """Hash everything that the distilled weights depend on."""
    distillation = plan.distillation.model_dump(mode="json") if plan.distillation.epochs else None
    parts = {
        "backbone": backbone.sha256,
        "shape": {name: getattr(split, name) for name in shape},
        "distillation": distillation,
        "seed": plan.seed if distillation else None,
        "images": None if file is None else sha256_of(file),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def image_file(plan: RunPlan, cache_dir: Path) -> Path:
    """Return the file with the images to distil on.

    Raises:
        InvalidField: the server does not have it.
    """
    path = cache_dir.parent / IMAGES / f"{plan.distillation.images}.safetensors"
    if not path.is_file():
        raise InvalidField(
            "the server does not have these images",
            field="distillation.images",
            limit=sorted(["random", *(file.stem for file in path.parent.glob("*.safetensors"))]),
            value=plan.distillation.images,
            hint=f"put them into the server's data folder as {IMAGES}/NAME.safetensors",
        )
    return path


def load_images(plan: RunPlan, split: ModelPlan, file: Path | None) -> Tensor:
    """Load or draw the images, preprocessed for the backbone, [N, 3, S, S] in float32."""
    distillation, side = plan.distillation, split.image_size
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "distillation-images"))
    if distillation.epochs == 0:
        return torch.empty(0, 3, side, side)
    if file is None:
        return torch.randn(distillation.samples, 3, side, side, generator=generator)
    stored = TensorFile(file)
    pixels = stored.get("images")
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InvalidField(
            "the file does not contain images",
            field="distillation.images",
            limit="a tensor images, uint8 [N, 3, H, W]",
            value=distillation.images,
        )
    chosen = torch.randperm(len(pixels), generator=generator)[: distillation.samples]
    scaled = pixels[chosen].to(torch.float32) / 255
    sized = F.interpolate(scaled, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    preprocessing = split_model.image_preparation(split)
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    return (sized - mean) / deviation
