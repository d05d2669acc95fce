"""The device's part of the model: head, soft prompts and tail; never the server's body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from edge_client.data.batches import BatchReader, Interpolation, Preprocessing
from edge_client.data.pictures import parse_colour
from protocol.errors import MalformedFrame
from protocol.plan import ModelPlan
from split_model.backbone.architecture import body_blocks
from split_model.checkpoints.head_file import extra_tensors, read_head_file
from split_model.checkpoints.metadata import ImagePreparation, head_plan
from split_model.checkpoints.state import (
    TunedState,
    apply_state,
    check_device_state,
    head_tensors,
    load_state,
    read_state,
    tail_tensors,
)
from split_model.errors import (
    ModelPlanError,
    TensorFileError,
    UnsupportedBackboneError,
    WeightsMismatchError,
)
from split_model.layers.prompts import prompt_shape
from split_model.parts.build import Layered, build_head, build_tail
from split_model.parts.head import Head
from split_model.parts.tail import Tail

_BATCH = 128

# What reading a damaged or foreign file raises.
UNUSABLE = (TensorFileError, ModelPlanError, UnsupportedBackboneError, WeightsMismatchError)


@dataclass
class DeviceModel:
    """Head and tail as modules, the prompts as a parameter.

    Attributes:
        prompts: [P, D], or deep [L, P, D]; None: the run has none, or the server tunes them (at
            the cut).
        extras: further frozen tensors, for the device's side of the run's method.
    """

    head: Head
    tail: Tail
    prompts: nn.Parameter | None
    preprocessing: Preprocessing
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, settings: ModelPlan, head_file: Path, state_file: Path) -> DeviceModel:
        """Build the model from the server's files. The body is never allocated.

        Raises:
            MalformedFrame: a file is damaged, or the head is of another model than the run's.
        """
        try:
            stored, images, frozen = read_head_file(head_file)
        except UNUSABLE as error:
            raise _unusable(head_file, error) from error
        if stored != head_plan(settings):
            raise MalformedFrame(
                "the head file is of another model than the run's",
                field="head",
                limit=str(head_plan(settings)),
                value=str(stored),
            )
        state = _read(state_file)
        try:
            check_device_state(settings, state)
        except UNUSABLE as error:
            raise _unusable(state_file, error) from error
        has_prompts = settings.prompt_count and settings.prompt_at == "input"
        prompts = nn.Parameter(torch.empty(prompt_shape(settings))) if has_prompts else None
        preprocessing = preprocessing_of(settings, images)
        try:
            head = build_head(settings, Layered(head_tensors(state), frozen))
            tail = build_tail(settings, Layered(tail_tensors(state), frozen))
            extras = extra_tensors(frozen)
        except UNUSABLE as error:
            raise _unusable(head_file, error) from error
        apply_state(tail, prompts, state, head)
        return cls(head, tail, prompts, preprocessing, extras)

    @property
    def is_whole(self) -> bool:
        """Whether head and tail are the whole model: no block is left for a body."""
        return not body_blocks(self.head.settings)

    def classify(self, inferred: Tensor) -> Tensor:
        """Return logits [B, C] of what an inference returned: features, or logits already."""
        logits: Tensor = inferred if self.tail.settings.depths else self.tail(inferred)
        return logits

    def parameters(self) -> list[nn.Parameter]:
        """Return all tuned parameters on this device: of prompts, tail and head."""
        prompts = [] if self.prompts is None else [self.prompts]
        parts = [*self.tail.parameters(), *self.head.parameters()]
        return prompts + [parameter for parameter in parts if parameter.requires_grad]

    def load_global_state(self, state_file: Path) -> None:
        """Replace the tuned tensors by a global state's, in place.

        Raises:
            MalformedFrame: the file is damaged, or of another model.
        """
        try:
            apply_state(self.tail, self.prompts, _read(state_file), self.head)
        except UNUSABLE as error:
            raise _unusable(state_file, error) from error

    def state(self) -> TunedState:
        """Return float32 copies of the tuned tensors."""
        return read_state(self.tail, self.prompts, self.head)

    @torch.no_grad()
    def add_mean_token(self, samples: BatchReader) -> None:
        """Shift the prompts by the samples' mean embedded token; of deep prompts, the first layer.

        Every participant does so in the first round. FedAvg then starts the prompts at the mean of
        all participants' data, which no single party sees.
        """
        if self.prompts is None or len(samples) == 0:
            return
        total, count = torch.zeros(self.prompts.shape[-1], dtype=torch.float64), 0
        for positions in torch.arange(len(samples)).split(_BATCH):
            images, _ = samples.read(positions)
            tokens = self.head.embed(images)[:, self.head.sizes.prefix :]  # [b, N, D]
            total += tokens.sum(dim=(0, 1)).double()
            count += tokens.shape[0] * tokens.shape[1]
        first = self.prompts[0] if self.prompts.ndim == 3 else self.prompts  # [P, D]
        first.add_((total / count).to(first.dtype))


def preprocessing_of(split: ModelPlan, images: ImagePreparation) -> Preprocessing:
    """Return the preprocessing: as the backbone was trained, and as the run's settings fit images.

    Raises:
        PreprocessingError: the backbone uses an interpolation that is not supported here.
    """
    interpolation = cast(Interpolation, images.interpolation)
    return Preprocessing(
        split.image_size,
        images.mean,
        images.std,
        interpolation,
        split.fit,
        parse_colour(split.background),
    )


def _read(state_file: Path) -> TunedState:
    try:
        return load_state(state_file)
    except UNUSABLE as error:
        raise _unusable(state_file, error) from error


def _unusable(file: Path, error: Exception) -> MalformedFrame:
    return MalformedFrame(f"a file of the server cannot be used: {error}", value=str(file))
