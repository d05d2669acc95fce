"""The part of the model that a device holds: head, soft prompts and tail. Never a body."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from edge_client.data import BatchReader, Interpolation, Preprocessing
from protocol.errors import MalformedFrame
from protocol.plan import ModelPlan
from split_model import (
    Head,
    ImagePreparation,
    Layered,
    ModelPlanError,
    Tail,
    TensorFileError,
    TunedState,
    UnsupportedBackboneError,
    WeightsMismatchError,
    apply_state,
    body_blocks,
    build_head,
    build_tail,
    check_device_state,
    head_tensors,
    load_state,
    prompt_shape,
    read_head_file,
    read_state,
    tail_tensors,
)
from split_model.checkpoints.head_file import local_body_tensors
from split_model.proxies.local_body import LocalBody, build_local_body

_CHUNK = 128

# What a file raises that is not what it should be.
UNUSABLE = (TensorFileError, ModelPlanError, UnsupportedBackboneError, WeightsMismatchError)


@dataclass
class DeviceModel:
    """Head and tail as modules, the prompts, [P, D] or deep [L, P, D], as a parameter.

    No prompts where there are none, or where they join at the cut and so live on the server.
    """

    head: Head
    tail: Tail
    prompts: nn.Parameter | None
    preprocessing: Preprocessing
    local_body: LocalBody | None = None  # what the local update has for a body

    @classmethod
    def load(cls, settings: ModelPlan, head_file: Path, state_file: Path) -> DeviceModel:
        """Build from the files of the server. The body is never allocated.

        Raises:
            MalformedFrame: a file is damaged, or the head is not of this run's model.
        """
        try:
            split, images, frozen = read_head_file(head_file)
        except UNUSABLE as error:
            raise _unusable(head_file, error) from error
        if split != settings.model_copy(update={"weights": split.weights}):
            raise MalformedFrame(
                "the head belongs to another model than the run's",
                field="head",
                limit=settings.model_dump_json(),
                value=str(split),
            )
        state = _read(state_file)
        try:
            check_device_state(split, state)
        except UNUSABLE as error:
            raise _unusable(state_file, error) from error
        held = split.prompt_count and split.prompt_at == "input"
        prompts = nn.Parameter(torch.empty(prompt_shape(split))) if held else None
        way = preprocessing_of(split, images)
        try:
            head = build_head(split, Layered(head_tensors(state), frozen))
            tail = build_tail(split, Layered(tail_tensors(state), frozen))
            small = local_body_tensors(frozen)
            body = build_local_body(split, small) if split.local_body else None
        except UNUSABLE as error:
            raise _unusable(head_file, error) from error
        apply_state(tail, prompts, state, head)
        return cls(head, tail, prompts, way, body)

    @property
    def is_whole(self) -> bool:
        """Whether no block is left for a body: head and tail are the model."""
        return not body_blocks(self.head.settings)

    def parameters(self) -> list[nn.Parameter]:
        """All that is tuned here: prompts, tail, and what is tuned of the head."""
        held = [] if self.prompts is None else [self.prompts]
        parts = [*self.tail.parameters(), *self.head.parameters()]
        return held + [own for own in parts if own.requires_grad]

    def take(self, state_file: Path) -> None:
        """Take over a global state, in place.

        Raises:
            MalformedFrame: the file is damaged, or not of this model.
        """
        try:
            apply_state(self.tail, self.prompts, _read(state_file), self.head)
        except UNUSABLE as error:
            raise _unusable(state_file, error) from error

    def state(self) -> TunedState:
        """What is tuned here, as it is now: float32 copies."""
        return read_state(self.tail, self.prompts, self.head)

    @torch.no_grad()
    def add_mean_token(self, samples: BatchReader) -> None:
        """Shift the prompts by the mean embedded token of these samples, of deep ones the first.

        Done by every participant in the first round, so that FedAvg makes the prompts start from
        the mean of all data although nobody sees them.
        """
        if self.prompts is None or len(samples) == 0:
            return
        total, count = torch.zeros(self.prompts.shape[-1], dtype=torch.float64), 0
        for positions in torch.arange(len(samples)).split(_CHUNK):
            images, _ = samples.read(positions)
            tokens = self.head.embed(images)[:, self.head.sizes.prefix :]  # [b, N, D]
            total += tokens.sum(dim=(0, 1)).double()
            count += tokens.shape[0] * tokens.shape[1]
        first = self.prompts[0] if self.prompts.ndim == 3 else self.prompts  # (P, D)
        first.add_((total / count).to(first.dtype))


def preprocessing_of(split: ModelPlan, images: ImagePreparation) -> Preprocessing:
    """How an image becomes the input of this model, as its backbone was trained.

    Raises:
        PreprocessingError: the backbone's images were resized in a way that is not known here.
    """
    interpolation = cast(Interpolation, images.interpolation)
    return Preprocessing(split.image_size, images.mean, images.std, interpolation)


def _read(state_file: Path) -> TunedState:
    try:
        return load_state(state_file)
    except UNUSABLE as error:
        raise _unusable(state_file, error) from error


def _unusable(file: Path, error: Exception) -> MalformedFrame:
    return MalformedFrame(f"a file of the server cannot be used: {error}", value=str(file))
