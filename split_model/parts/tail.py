"""The tail: the last `tail_blocks` blocks, norm, pooling and classifier; tuned on the device."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.layers.adapters import add_lora, is_lora
from split_model.layers.prompts import drop_prompts
from split_model.parts.base import OUTPUT, POSITIONS, Part, is_bias

_CLASSIFIERS = ("head.", "head_dist.")  # prefixes of timm's names


class Tail(Part):
    """Computes logits from features. `tune` decides which parameters are trained.

    With tail blocks, the tail has and trains a copy of the learned positions that all blocks
    share (mixed rotary frequencies, a shared relative bias).
    """

    def __init__(self, settings: ModelPlan) -> None:
        depth = anatomy(settings).depth
        blocks = range(depth - settings.tail_blocks, depth)
        super().__init__(settings, blocks, OUTPUT | POSITIONS if blocks else OUTPUT)
        if settings.tune == "lora":
            add_lora(settings, self.blocks)

    @property
    def num_tokens(self) -> int | None:
        """The number of leading feature tokens that the tail reads; None: all."""
        return needed_tokens(self.settings)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits. Prompts act by attention only: they are dropped before pooling.

        Args:
            features: [B, T, D], where T is prefix + N, with or without P prompts, or as many
                tokens as `for_the_tail` returns.

        Returns:
            [B, C].

        Raises:
            TokenCountError: a shape that the plan does not allow.
        """
        logits: Tensor = self.trunk.forward_head(self._normed(features))
        return logits

    def pool(self, features: Tensor) -> Tensor:
        """Compute the classifier's input [B, F] from features [B, T, D]; raises as `forward`."""
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
            if self.sizes.averaged:  # timm's mean leaves the prefix out: its values do not matter
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
    """Whether timm's name of a tail's tensor belongs to the classifier."""
    return name.startswith(_CLASSIFIERS)


def needed_tokens(settings: ModelPlan) -> int | None:
    """The number of feature tokens that the tail reads; None: all.

    They are the leading tokens, or the single mean of the image tokens from `for_the_tail`.
    """
    sizes = anatomy(settings)
    if settings.tail_blocks or settings.depths:
        return None
    return 1 if sizes.averaged else sizes.num_tokens


def for_the_tail(settings: ModelPlan, features: Tensor) -> Tensor:
    """Reduce features [B, T, D] to the tokens that the tail reads, [B, `needed_tokens`, D]."""
    count, sizes = needed_tokens(settings), anatomy(settings)
    if count is None:
        return features
    if sizes.averaged:
        return features[:, -sizes.patches :].mean(dim=1, keepdim=True)
    return features[:, :count]
