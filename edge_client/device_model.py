"""The part of the model that a device holds: head, soft prompts and tail. Never the body."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from edge_client.data import BatchReader, Interpolation, Preprocessing
from protocol.errors import MalformedFrame
from protocol.settings import BackboneSettings
from split_model import (
    Head,
    SplitSettings,
    Tail,
    TunedState,
    apply_state,
    build_tail,
    load_state,
    prompt_shape,
    read_head_file,
    read_state,
    tail_tensors,
)

_CHUNK = 128


@dataclass
class DeviceModel:
    """Head and tail as modules, the prompts [P, D] as a parameter (None where there are none)."""

    head: Head
    tail: Tail
    prompts: nn.Parameter | None
    preprocessing: Preprocessing

    @classmethod
    def load(cls, settings: BackboneSettings, head_file: Path, state_file: Path) -> DeviceModel:
        """Build from the files of the server. The body is never allocated.

        Raises:
            MalformedFrame: the head is not of this run's model.
            TensorFileError, WeightsMismatchError: a file is damaged.
        """
        split, images, head = read_head_file(head_file)
        if split != SplitSettings.of(settings):
            raise MalformedFrame(
                "the head belongs to another model than the run's",
                field="head",
                limit=settings.model_dump_json(),
                value=str(split),
            )
        state = load_state(state_file)
        prompts = nn.Parameter(torch.empty(prompt_shape(split))) if split.prompt_count else None
        way = Preprocessing(
            split.image_size, images.mean, images.std, cast(Interpolation, images.interpolation)
        )
        model = cls(head, build_tail(split, tail_tensors(state)), prompts, way)
        model.apply(state)
        return model

    def apply(self, state: TunedState) -> None:
        """Take over a global state, in place."""
        apply_state(self.tail, self.prompts, state)

    def state(self) -> TunedState:
        """Prompts and tail as they are now: float32 copies."""
        return read_state(self.tail, self.prompts)

    @torch.no_grad()
    def add_mean_token(self, samples: BatchReader) -> None:
        """Shift the prompts by the mean embedded token of these samples.

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
        self.prompts.add_((total / count).to(self.prompts.dtype))
