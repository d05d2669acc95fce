"""The head: patch embedding and the first `cut` blocks, on the device; frozen, or tuned there."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.errors import TokenCountError
from split_model.layers.adapters import Adapter, add_lora, is_lora
from split_model.layers.prompts import insert_prompts, prompt_shape
from split_model.layers.token_merging import merge_tokens
from split_model.parts.base import EMBEDDING, POSITIONS, Part, is_bias

ADAPTER = "adapter."  # before the names of its tensors, which timm's model does not have


class Head(Part):
    """Images to smashed data. Gradients flow to the prompts, and to what `tune` names."""

    def __init__(self, settings: ModelPlan) -> None:
        super().__init__(settings, range(settings.cut), EMBEDDING | POSITIONS)
        self.adapter: Adapter | None = None
        if settings.tune == "adapter":
            self.adapter = Adapter(self.sizes.width, settings.adapter_width)
        if settings.tune == "lora":
            add_lora(settings, self.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to the tokens ahead of the first block, [B, prefix + N, D].

        Raises `TokenCountError` for images of another shape.
        """
        side = self.settings.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise TokenCountError("images", f"[batch, 3, {side}, {side}]", tuple(images.shape))
        # Without blocks and norm, what remains of timm's own forward pass is the embedding.
        tokens: Tensor = self.trunk.forward_features(images)
        return tokens

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] and prompts [P, D] to smashed data [B, prefix + P + N, D].

        Deep prompts are [L, P, D], one set for each block. Without prompts T is prefix + N, with
        `keep_tokens` image tokens in place of N. Raises `TokenCountError`.
        """
        tokens = self.embed(images)
        if prompts is None:
            return self._merged(self.run(tokens, 0, self.adapter))
        expected = prompt_shape(self.settings)
        if tuple(prompts.shape) != expected:
            raise TokenCountError("prompts", f"of shape {list(expected)}", tuple(prompts.shape))
        if self.settings.prompt_depth == "deep":
            return self.run_deep(tokens, prompts, self.adapter)
        tokens = insert_prompts(tokens, prompts, self.sizes.prefix)
        return self.run(tokens, prompts.shape[0], self.adapter)

    def _tunes(self, name: str, *, parameter: bool) -> bool:
        tune = self.settings.tune
        if is_added(name):
            return True
        if tune == "bias":
            return parameter and is_bias(name)
        return parameter and tune == "full"

    def _merged(self, tokens: Tensor) -> Tensor:
        keep, prefix = self.settings.keep_tokens, self.sizes.prefix
        if not keep:
            return tokens
        return torch.cat([tokens[:, :prefix], merge_tokens(tokens[:, prefix:], keep)], dim=1)


def is_added(name: str) -> bool:
    """Whether a tensor of this name is tuned beside timm's own, which do not have it."""
    return name.startswith(ADAPTER) or is_lora(name)
