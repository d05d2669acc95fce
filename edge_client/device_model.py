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
    SplitSettingsError,
    Tail,
    TensorFileError,
    TunedState,
    UnsupportedBackboneError,
    WeightsMismatchError,
    apply_state,
    build_tail,
    load_state,
    prompt_shape,
    read_head_file,
    read_state,
    tail_tensors,
)

_CHUNK = 128
_UNUSABLE = (TensorFileError, SplitSettingsError, UnsupportedBackboneError, WeightsMismatchError)


@dataclass
class DeviceModel:
    """Head and tail as modules, the prompts [P, D] as a parameter.

    No prompts where there are none, or where they join at the cut and so live on the server.
    """

    head: Head
    tail: Tail
    prompts: nn.Parameter | None
    preprocessing: Preprocessing

    @classmethod
    def load(cls, settings: BackboneSettings, head_file: Path, state_file: Path) -> DeviceModel:
        """Build from the files of the server. The body is never allocated.

        Raises:
            MalformedFrame: a file is damaged, or the head is not of this run's model.
        """
        try:
            split, images, head = read_head_file(head_file)
        except _UNUSABLE as error:
            raise _unusable(head_file, error) from error
        if split != SplitSettings.of(settings):
            raise MalformedFrame(
                "the head belongs to another model than the run's",
                field="head",
                limit=settings.model_dump_json(),
                value=str(split),
            )
        state = _read(state_file)
        held = split.prompt_count and split.prompt_at == "input"
        prompts = nn.Parameter(torch.empty(prompt_shape(split))) if held else None
        way = Preprocessing(
            split.image_size, images.mean, images.std, cast(Interpolation, images.interpolation)
        )
        try:
            model = cls(head, build_tail(split, tail_tensors(state)), prompts, way)
            apply_state(model.tail, model.prompts, state)
        except _UNUSABLE as error:
            raise _unusable(state_file, error) from error
        return model

    def take(self, state_file: Path) -> None:
        """Take over a global state, in place.

        Raises:
            MalformedFrame: the file is damaged, or not of this model.
        """
        try:
            apply_state(self.tail, self.prompts, _read(state_file))
        except _UNUSABLE as error:
            raise _unusable(state_file, error) from error

    def state(self) -> TunedState:
        """Tail and prompts, if they are here, as they are now: float32 copies."""
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


def _read(state_file: Path) -> TunedState:
    try:
        return load_state(state_file)
    except _UNUSABLE as error:
        raise _unusable(state_file, error) from error


def _unusable(file: Path, error: Exception) -> MalformedFrame:
    return MalformedFrame(f"a file of the server cannot be used: {error}", value=str(file))
