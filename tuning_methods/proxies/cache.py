"""Distil smaller replacements for blocks once, and cache them in the server's data folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_client.model import preprocessing_of
from protocol.errors import InvalidField
from protocol.plan import ModelPlan, RunPlan
from protocol.seeds import derive_seed
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.backbone.weights import BackboneFile, open_backbone
from split_model.checkpoints.metadata import image_preparation
from split_model.files import sha256_of
from tuning_methods.proxies.settings import DistillationSettings, distillation_of

log = logging.getLogger(__name__)

IMAGES = "distillation"  # folder in the server's data folder with the image files

Distil = Callable[
    [ModelPlan, Mapping[str, Tensor], Tensor, DistillationSettings, int], dict[str, Tensor]
]


def distil_once(
    plan: RunPlan,
    backbone: BackboneFile,
    cache_dir: Path,
    shape: Mapping[str, object],
    distil: Distil,
) -> Path:
    """Return the cached file of a distillation; distil first if it is not cached.

    Args:
        plan: the run's plan.
        backbone: the teacher's file.
        cache_dir: folder of backbones and distilled weights, in the server's data folder.
        shape: the settings that decide the result's shape, by name.
        distil: computes the weights from the model's plan, the backbone's weights, the images
            [N, 3, S, S], the distillation's settings and a seed.

    Raises:
        InvalidField: the images are missing, or the plan does not fit the backbone.
    """
    image_path = find_image_file(plan, cache_dir)
    key = _cache_key(plan, backbone, shape, image_path)
    path = cache_dir / f"proxy-{key[:32]}.safetensors"
    if path.is_file():
        return path
    log.info("distilling %s from %s", path.stem, plan.model.backbone)
    images = load_images(plan, image_path)
    seed = derive_seed(plan.seed, "proxy")
    teacher = open_backbone(backbone.path)
    weights = distil(plan.model, teacher, images, distillation_of(plan), seed)
    write_tensors(path, weights, {"backbone": plan.model.backbone})
    log.info("%s is ready", path.stem)
    return path


def _cache_key(
    plan: RunPlan, backbone: BackboneFile, shape: Mapping[str, object], image_path: Path | None
) -> str:
    """Hash everything that the distilled weights depend on."""
    settings = distillation_of(plan)
    distillation = settings.model_dump(mode="json") if settings.epochs else None
    parts = {
        "backbone": backbone.sha256,
        "shape": dict(shape),
        "distillation": distillation,
        "seed": plan.seed if distillation else None,
        "images": None if image_path is None else sha256_of(image_path),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_image_file(plan: RunPlan, cache_dir: Path) -> Path | None:
    """Return the file of the distillation's images; None: it uses noise, or there is none.

    Raises:
        InvalidField: the server does not have the file.
    """
    distillation = distillation_of(plan)
    if distillation.epochs == 0 or distillation.images == "random":
        return None
    path = cache_dir.parent / IMAGES / f"{distillation.images}.safetensors"
    if not path.is_file():
        raise InvalidField(
            "the server does not have these images",
            field="method.distillation.images",
            limit=sorted(["random", *(file.stem for file in path.parent.glob("*.safetensors"))]),
            value=distillation.images,
            hint=f"put them into the server's data folder as {IMAGES}/NAME.safetensors",
        )
    return path


def load_images(plan: RunPlan, image_path: Path | None) -> Tensor:
    """Load the distillation's images, preprocessed as on devices, or draw noise.

    Args:
        plan: the run's plan.
        image_path: as `find_image_file` returns it.

    Returns:
        Images [N, 3, S, S] in float32; N is 0 without distillation.

    Raises:
        InvalidField: the file does not contain images.
    """
    distillation, side = distillation_of(plan), plan.model.image_size
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "distillation-images"))
    if distillation.epochs == 0:
        return torch.empty(0, 3, side, side)
    if image_path is None:
        return torch.randn(distillation.samples, 3, side, side, generator=generator)
    pixels = TensorFile(image_path).get("images")
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InvalidField(
            "the file does not contain images",
            field="method.distillation.images",
            limit="a tensor images, uint8 [N, 3, H, W]",
            value=distillation.images,
            hint=f"write the images into {IMAGES}/{image_path.name} as this tensor",
        )
    selected = torch.randperm(len(pixels), generator=generator)[: distillation.samples]
    preprocessing = preprocessing_of(plan.model, image_preparation(plan.model))
    resized = [preprocessing.resize(each) for each in pixels[selected].numpy()]
    return torch.from_numpy(preprocessing.normalise(np.stack(resized)))
