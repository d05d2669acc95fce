"""The device's part of the model in torch: head, soft prompts and tail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_client.data.batches import BatchReader, Preprocessing
from edge_client.data.image_set import Labels
from edge_client.model import UNUSABLE, Floats, Model, State, preprocessing_of, unusable
from protocol.errors import MalformedFrame
from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, body_blocks
from split_model.checkpoints.head_file import extra_tensors, read_head_file
from split_model.checkpoints.metadata import head_plan
from split_model.checkpoints.state import (
    TunedState,
    apply_state,
    check_device_state,
    head_tensors,
    load_state,
    read_state,
    tail_tensors,
)
from split_model.layers.prompts import prompt_shape
from split_model.parts.build import Layered, build_head, build_tail
from split_model.parts.depths import feature_shape
from split_model.parts.head import Head
from split_model.parts.tail import Tail, for_the_tail, needed_tokens

if TYPE_CHECKING:
    from edge_client.training.context import RoundContext

_BATCH = 128


@dataclass
class TorchModel(Model):
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
    def load(cls, settings: ModelPlan, head_file: Path, state_file: Path) -> TorchModel:
        """Build the model from the server's files. The body is never allocated.

        Raises:
            MalformedFrame: a file is damaged, or the head is of another model than the run's.
        """
        try:
            stored, images, frozen = read_head_file(head_file)
        except UNUSABLE as error:
            raise unusable(head_file, error) from error
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
            raise unusable(state_file, error) from error
        has_prompts = settings.prompt_count and settings.prompt_at == "input"
        prompts = nn.Parameter(torch.empty(prompt_shape(settings))) if has_prompts else None
        preprocessing = preprocessing_of(settings, images)
        try:
            head = build_head(settings, Layered(head_tensors(state), frozen))
            tail = build_tail(settings, Layered(tail_tensors(state), frozen))
            extras = extra_tensors(frozen)
        except UNUSABLE as error:
            raise unusable(head_file, error) from error
        apply_state(tail, prompts, state, head)
        return cls(head, tail, prompts, preprocessing, extras)

    def __post_init__(self) -> None:
        self.settings, sizes = self.head.settings, self.head.sizes
        self.tokens, self.width = sizes.tokens, sizes.width
        read = needed_tokens(self.settings)
        kept = sizes.tokens if read is None else read
        self.cached_tokens = 0 if self.settings.depths else kept
        self.is_whole = not body_blocks(self.settings)

    @torch.no_grad()
    def smashed(self, images: Floats) -> Floats:
        return _array(self.head(torch.from_numpy(images), self.prompts))

    def for_tail(self, smashed: Floats) -> Floats:
        return _array(for_the_tail(self.settings, torch.from_numpy(smashed)))

    @torch.no_grad()
    def classify(self, inferred: Floats) -> Floats:
        if self.settings.depths:
            return inferred
        return _array(self.tail(torch.from_numpy(inferred)))

    @property
    def classifier(self) -> tuple[Floats, Floats]:
        layer = self.tail.trunk.head
        return _array(layer.weight), _array(layer.bias)

    @torch.no_grad()
    def set_classifier(self, weight: NDArray[np.floating], bias: NDArray[np.floating]) -> None:
        layer = self.tail.trunk.head
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))

    def feature_shape(self, pooled: bool) -> tuple[int, int]:
        return wire_shape(self.settings, pooled)

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
            raise unusable(state_file, error) from error

    def state(self) -> State:
        """Return float32 copies of the tuned tensors."""
        state = read_state(self.tail, self.prompts, self.head)
        return {name: tensor.numpy() for name, tensor in state.items()}

    @torch.no_grad()
    def add_mean_token(self, samples: BatchReader) -> None:
        """Shift the prompts by the samples' mean embedded token; of deep prompts, the first layer.

        Every participant does so in the first round. FedAvg then starts the prompts at the mean of
        all participants' data, which no single party sees.
        """
        if self.prompts is None or len(samples) == 0:
            return
        total, count = torch.zeros(self.prompts.shape[-1], dtype=torch.float64), 0
        for start in range(0, len(samples), _BATCH):
            images, _ = read(samples, np.arange(start, min(start + _BATCH, len(samples))))
            tokens = self.head.embed(images)[:, self.head.sizes.prefix :]  # [b, N, D]
            total += tokens.sum(dim=(0, 1)).double()
            count += tokens.shape[0] * tokens.shape[1]
        first = self.prompts[0] if self.prompts.ndim == 3 else self.prompts  # [P, D]
        first.add_((total / count).to(first.dtype))


def wire_shape(split: ModelPlan, pooled: bool) -> tuple[int, int]:
    """Return the shape [T', D'] of one sample's features on the wire; see `Model.feature_shape`."""
    if split.depths:
        return feature_shape(split)
    sizes = anatomy(split)
    read = needed_tokens(split) if pooled else None
    return (sizes.tokens + split.prompt_count if read is None else read), sizes.width


def model_of(context: RoundContext) -> TorchModel:
    """Return a round's model, for phases that compute gradients.

    Raises:
        TypeError: it has none: `edge_client.model.needs_torch` is wrong about the run.
    """
    if not isinstance(context.model, TorchModel):
        raise TypeError(f"gradients need torch, not a {type(context.model).__name__}")
    return context.model


def read(
    samples: BatchReader, positions: Labels, epoch: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read a batch as tensors: images float32 [b, 3, S, S] and labels int64 [b]."""
    images, labels = samples.read(positions, epoch=epoch)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().numpy()
    return array


def _read(state_file: Path) -> TunedState:
    try:
        return load_state(state_file)
    except UNUSABLE as error:
        raise unusable(state_file, error) from error
