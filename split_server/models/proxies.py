"""Smaller stand-ins for blocks, made once from the backbone and kept in the server's folder."""

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
from split_server.federation.snapshot import RunSnapshot
from split_server.payloads.tensors import require_finite
from tuning_methods.proxies.distillation import distilled_proxy, redistilled_proxy
from tuning_methods.sfprompt.local_body import local_body_weights

log = logging.getLogger(__name__)

IMAGES = "distillation"  # of the server's folder: files of images to distil on

_PROXY = ("proxy", "proxy_ends", "proxy_width", "proxy_blocks")

_LOCAL_BODY = ("local_body", "cut", "tail_blocks")

Make = Callable[
    [ModelPlan, Mapping[str, Tensor], Tensor, DistillationSettings, int], dict[str, Tensor]
]


def prepare_proxy(
    settings: RunPlan, split: ModelPlan, backbone: BackboneFile, cache_dir: Path
) -> Path:
    """The file with the weights of the run's model: of the backbone, or of the proxy made from it.

    A proxy of equal shape, distilled alike on equal images, is made once. Distillation takes
    minutes: never call it on the event loop.

    Raises:
        InvalidField: there are no such images, or they cannot be used.
    """
    if split.proxy == "none":
        return backbone.path
    return _made_once(settings, split, backbone, cache_dir, _PROXY, distilled_proxy)


def prepare_local_body(
    settings: RunPlan, split: ModelPlan, backbone: BackboneFile, cache_dir: Path
) -> Mapping[str, Tensor] | None:
    """The tensors of the small body for the devices' local update; None where there is none.

    Kept and made as a proxy is; raises as `prepare_proxy` does.
    """
    if not split.local_body:
        return None
    make = local_body_weights
    return TensorFile(_made_once(settings, split, backbone, cache_dir, _LOCAL_BODY, make))


def write_redistilled_proxy(
    run: RunSnapshot,
    split: ModelPlan,
    backbone: BackboneFile,
    state: Mapping[str, Tensor],
    inactive: Tensor,
    cache_dir: Path,
    out: Path,
    check: Callable[[], None],
) -> None:
    """Distil the run's proxy again, on the images that it was made with, and write it whole.

    Args:
        state: the global state.
        inactive: how often each neuron was inactive, [L, H].
        check: is called now and then; what it raises ends the work.

    Raises:
        InvalidField: there are no such images any more, or they cannot be used.
        NonFinite: the distillation has diverged.
    """
    settings, how = run.plan, run.plan.distillation
    file = None if how.images == "random" else _image_file(settings, cache_dir)
    log.info("run %s: distilling its proxy again after round %d", run.id, run.closed_rounds)
    made = redistilled_proxy(
        split,
        split_model.open_backbone(backbone.path),
        split_model.open_backbone(run.backbone_path),
        state,
        inactive,
        _images(settings, split, file),
        how,
        derive_seed(settings.seed, "proxy", run.closed_rounds),
        check,
    )
    require_finite(made)
    write_tensors(out, made, {"backbone": split.backbone})


def _made_once(
    settings: RunPlan,
    split: ModelPlan,
    backbone: BackboneFile,
    cache_dir: Path,
    shape: tuple[str, ...],
    make: Make,
) -> Path:
    file = None
    if settings.distillation.epochs and settings.distillation.images != "random":
        file = _image_file(settings, cache_dir)
    path = cache_dir / f"proxy-{_key(settings, split, backbone, shape, file)[:32]}.safetensors"
    if path.is_file():
        return path
    log.info("making %s of %s", path.stem, split.backbone)
    images = _images(settings, split, file)
    seed = derive_seed(settings.seed, "proxy")
    weights = split_model.open_backbone(backbone.path)
    made = make(split, weights, images, settings.distillation, seed)
    write_tensors(path, made, {"backbone": split.backbone})
    log.info("%s is ready", path.stem)
    return path


def _key(
    settings: RunPlan,
    split: ModelPlan,
    backbone: BackboneFile,
    shape: tuple[str, ...],
    file: Path | None,
) -> str:
    how = settings.distillation.model_dump(mode="json") if settings.distillation.epochs else None
    what = {
        "backbone": backbone.sha256,
        "shape": {name: getattr(split, name) for name in shape},
        "distillation": how,
        "seed": settings.seed if how else None,
        "images": None if file is None else sha256_of(file),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _image_file(settings: RunPlan, cache_dir: Path) -> Path:
    path = cache_dir.parent / IMAGES / f"{settings.distillation.images}.safetensors"
    if not path.is_file():
        raise InvalidField(
            "the server has no such images",
            field="distillation.images",
            limit=sorted(["random", *(one.stem for one in path.parent.glob("*.safetensors"))]),
            value=settings.distillation.images,
            hint=f"put them into the server's folder as {IMAGES}/NAME.safetensors",
        )
    return path


def _images(settings: RunPlan, split: ModelPlan, file: Path | None) -> Tensor:
    """Prepared for the backbone, [N, 3, S, S] in float32."""
    how, side = settings.distillation, split.image_size
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "distillation-images"))
    if how.epochs == 0:
        return torch.empty(0, 3, side, side)
    if file is None:
        return torch.randn(how.samples, 3, side, side, generator=generator)
    stored = TensorFile(file)
    pixels = stored.get("images")
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InvalidField(
            "the file has no images",
            field="distillation.images",
            limit="a tensor images, uint8 [N, 3, H, W]",
            value=how.images,
        )
    chosen = torch.randperm(len(pixels), generator=generator)[: how.samples]
    scaled = pixels[chosen].to(torch.float32) / 255
    sized = F.interpolate(scaled, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    way = split_model.image_preparation(split)
    mean, deviation = (torch.tensor(own)[:, None, None] for own in (way.mean, way.std))
    return (sized - mean) / deviation
