"""A tuned model as one self-contained file, and the whole model in one module."""

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
    """Head, body, tail and prompts in one frozen module, for prediction."""

    def __init__(
        self,
        settings: ModelPlan,
        backbone: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> None:
        """Build the parts.

        Raises:
            WeightsMismatchError: the tensors do not fit the plan.
        """
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
        """Compute logits [B, C] of images [B, 3, S, S]."""
        prompts: Tensor | None = self.get_buffer("prompts") if self.settings.prompt_count else None
        at_input = self.settings.prompt_at == "input"
        smashed = self.head(images, prompts if at_input else None)
        features = self.body(smashed, None if at_input else prompts)
        logits: Tensor = self.tail(features)
        return logits


class ExportedModel(TunedModel):
    """A tuned model from a file, with its image preparation and class names.

    Attributes:
        preparation: how pixels become its input, as on the devices.
        class_names: of the logits, in their order; empty if the run had none.
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
    """Write backbone and tuned tensors as one self-contained safetensors file.

    Args:
        settings: the model's plan.
        backbone_path: of the prepared backbone.
        state: the tuned tensors; the file holds them in place of the backbone's.
        out: the file to write.
        extra_metadata: further entries of its metadata.
        class_names: of the logits, in their order.
        head: the device's frozen weights, if the head file quantised them.

    Returns:
        The path of the file.

    Raises:
        WeightsMismatchError: the state does not fit the plan.
        TensorFileError: the backbone cannot be read.
    """
    check_state(settings, state)
    backbone = open_backbone(backbone_path)
    in_body = frozen_body_names(settings)  # a table that head and body share stays exact
    quantised = {} if head is None else {name: head[name] for name in head if name not in in_body}
    names = dict.fromkeys([*frozen_names(settings), *in_body])
    tensors = {_BACKBONE + name: quantised.get(name, backbone[name]) for name in names}
    metadata = {
        **(extra_metadata or {}),
        **model_metadata(settings),
        _CLASSES: json.dumps(list(class_names or ())),
    }
    write_tensors(Path(out), {**tensors, **state}, metadata)
    return Path(out)


def load_exported(path: Path | str) -> ExportedModel:
    """Load the whole model from a file of `export_model`.

    Raises:
        TensorFileError: the file is damaged, or no exported model.
        ModelPlanError: its plan does not fit the backbone.
        UnsupportedBackboneError: this timm cannot build its backbone.
        WeightsMismatchError: a tensor is missing or has another shape.
    """
    file = TensorFile(Path(path))
    settings = read_plan(file)
    backbone = {
        name.removeprefix(_BACKBONE): file[name] for name in file if name.startswith(_BACKBONE)
    }
    state = {name: file[name].to(torch.float32) for name in file if not name.startswith(_BACKBONE)}
    return ExportedModel(settings, backbone, state, read_preparation(file), _read_class_names(file))


def _read_class_names(file: TensorFile) -> list[str]:
    names = file.json(_CLASSES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TensorFileError(file.path, "its class names are invalid")
    return names
