"""The tail: optionally the last blocks, then norm, pooling and classifier; tuned on the device."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.layers.adapters import add_lora, is_lora
from split_model.layers.prompts import drop_prompts
from split_model.parts.base import OUTPUT, POSITIONS, Part, is_bias

_CLASSIFIERS = ("head.", "head_dist.")  # timm's names begin so


class Tail(Part):
    """Features to logits. Every parameter is trained, or those that `tune` names.

    With tail blocks, learned positions that all blocks share (mixed rotary frequencies, a shared
    relative bias) are copied into the tail and trained there.
    """

    def __init__(self, settings: ModelPlan) -> None:
        depth = anatomy(settings).depth
        blocks = range(depth - settings.tail_blocks, depth)
        super().__init__(settings, blocks, OUTPUT | POSITIONS if blocks else OUTPUT)
        if settings.tune == "lora":
            add_lora(settings, self.blocks)

    @property
    def num_tokens(self) -> int | None:
        """How many leading feature tokens are enough, or None where all are needed."""
        return needed_tokens(self.settings)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, D] to logits [B, C].

        T is prefix + N, with or without P prompts, or what `for_the_tail` leaves of them. Prompts
        act by attention only: they are dropped ahead of pooling. Raises `TokenCountError`.
        """
        logits: Tensor = self.trunk.forward_head(self._normed(features))
        return logits

    def pool(self, features: Tensor) -> Tensor:
        """[B, T, D] to what the classifier reads, [B, F]. Raises `TokenCountError`."""
        pooled: Tensor = self.trunk.forward_head(self._normed(features), pre_logits=True)
        return pooled

    def _tunes(self, name: str, *, parameter: bool) -> bool:
        tune = self.settings.tune
        if tune in ("tail", "full") or is_classifier(name) or is_lora(name):
            return True
        return tune == "bias" and parameter and is_bias(name)

    def _normed(self, features: Tensor) -> Tensor:
        if (
            self.num_tokens is not None
            and features.ndim == 3
            and features.shape[1] == self.num_tokens
        ):
            tokens = features
            if self.sizes.averaged:  # timm leaves the prefix out of the mean: any will do
                empty = features.new_zeros(len(features), self.sizes.prefix, features.shape[2])
                tokens = torch.cat([empty, features], dim=1)
        else:
            prompts = self.prompt_tokens(features, "features")
            tokens = self.run(features, prompts)
            if prompts:
                tokens = drop_prompts(tokens, prompts, self.sizes.prefix)
        normed: Tensor = self.trunk.norm(tokens)
        return normed


def is_classifier(name: str) -> bool:
    """Whether timm's name of a tensor of the tail is one of the classifier's."""
    return name.startswith(_CLASSIFIERS)


def needed_tokens(settings: ModelPlan) -> int | None:
    """How many tokens of the features the tail reads, or None where it reads them all.

    They are the leading ones, or the one mean that `for_the_tail` makes of the image tokens.
    """
    sizes = anatomy(settings)
    if settings.tail_blocks:
        return None
    return 1 if sizes.averaged else sizes.num_tokens


def for_the_tail(settings: ModelPlan, features: Tensor) -> Tensor:
    """What the tail reads of features [B, T, D], [B, T', D], T' as `needed_tokens` says."""
    count, sizes = needed_tokens(settings), anatomy(settings)
    if count is None:
        return features
    if sizes.averaged:
        return features[:, -sizes.patches :].mean(dim=1, keepdim=True)
    return features[:, :count]
