"""A tuned model as one file that runs without any server."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.metadata import (
    ImagePreparation,
    model_metadata,
    read_plan,
    read_preparation,
)
from split_model.checkpoints.state import (
    PROMPTS,
    body_tensors,
    check_state,
    head_tensors,
    tail_tensors,
)
from split_model.errors import TensorFileError
from split_model.parts.build import (
    Layered,
    build_body,
    build_head,
    build_tail,
    frozen_body_names,
    frozen_names,
)

_BACKBONE, _CLASSES = "backbone.", "class_names"


class TunedModel(nn.Module):
    """Head, body, tail and prompts in one module, for prediction."""

    def __init__(
        self,
        settings: ModelPlan,
        backbone: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> None:
        """Raises `WeightsMismatchError` where the tensors do not fit the settings."""
        super().__init__()
        check_state(settings, state)
        self.settings = settings
        self.head = build_head(settings, Layered(head_tensors(state), backbone))
        self.body = build_body(settings, Layered(body_tensors(state), backbone))
        self.tail = build_tail(settings, Layered(tail_tensors(state), backbone))
        self.requires_grad_(False)
        self.register_buffer("prompts", state[PROMPTS].clone() if PROMPTS in state else None)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to logits [B, C]."""
        prompts: Tensor | None = self.get_buffer("prompts") if self.settings.prompt_count else None
        at_input = self.settings.prompt_at == "input"
        smashed = self.head(images, prompts if at_input else None)
        features = self.body(smashed, None if at_input else prompts)
        logits: Tensor = self.tail(features)
        return logits


class ExportedModel(TunedModel):
    """A tuned model from a file, which knows what to do with an image and what it says of it.

    Attributes: `preparation` (how pixels become its input, as the devices had it) and
    `class_names` (of the logits, in their order; empty where the run had none).
    """

    def __init__(
        self,
        settings: ModelPlan,
        backbone: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        preparation: ImagePreparation,
        class_names: Sequence[str],
    ) -> None:
        super().__init__(settings, backbone, state)
        self.preparation = preparation
        self.class_names = tuple(class_names)


def export_model(
    settings: ModelPlan,
    backbone_path: Path | str,
    state: Mapping[str, Tensor],
    out: Path | str,
    extra_metadata: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the backbone and what was tuned as one self-contained safetensors file.

    What was tuned stands there once. `class_names` are those of the logits, in their order. `head`
    are the frozen weights as devices had them, if they were rounded on their way.

    Raises `WeightsMismatchError` or `TensorFileError`.
    """
    check_state(settings, state)
    backbone = open_backbone(backbone_path)
    shared = frozen_body_names(settings)  # a table that both have stays exact
    rounded = {} if head is None else {name: head[name] for name in head if name not in shared}
    names = dict.fromkeys([*frozen_names(settings), *shared])
    tensors = {_BACKBONE + name: rounded.get(name, backbone[name]) for name in names}
    metadata = {
        **(extra_metadata or {}),
        **model_metadata(settings),
        _CLASSES: json.dumps(list(class_names or ())),
    }
    write_tensors(Path(out), {**tensors, **state}, metadata)
    return Path(out)


def load_exported(path: Path | str) -> ExportedModel:
    """The whole model from what `export_model` wrote: images [B, 3, S, S] to logits [B, C].

    Raises `TensorFileError`, `ModelPlanError` or `WeightsMismatchError`.
    """
    file = TensorFile(Path(path))
    settings = read_plan(file)
    backbone = {n.removeprefix(_BACKBONE): file[n] for n in file if n.startswith(_BACKBONE)}
    state = {n: file[n].to(torch.float32) for n in file if not n.startswith(_BACKBONE)}
    return ExportedModel(settings, backbone, state, read_preparation(file), _names(file))


def _names(file: TensorFile) -> list[str]:
    names = file.json(_CLASSES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TensorFileError(file.path, "its class names are broken")
    return names
