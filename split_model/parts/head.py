"""The head: patch embedding and the first `cut` blocks, on the device; frozen or tuned there."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.errors import TokenCountError
from split_model.layers.adapters import Adapter, add_lora, is_lora
from split_model.layers.prompts import insert_prompts, prompt_shape
from split_model.layers.token_merging import merge_tokens
from split_model.parts.base import EMBEDDING, POSITIONS, Part, is_bias

ADAPTER = "adapter."  # prefix of the adapter's tensors; timm's models have no such name


class Head(Part):
    """Computes smashed data from images. Gradients flow to prompts and tuned parameters."""

    def __init__(self, settings: ModelPlan) -> None:
        super().__init__(settings, range(settings.cut), EMBEDDING | POSITIONS)
        self.adapter: Adapter | None = None
        if settings.tune == "adapter":
            self.adapter = Adapter(self.sizes.width, settings.adapter_width)
        if settings.tune == "lora":
            add_lora(settings, self.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """Compute the first block's input, without prompts.

        Args:
            images: [B, 3, S, S].

        Returns:
            [B, prefix + N, D].

        Raises:
            TokenCountError: images of another shape.
        """
        side = self.settings.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise TokenCountError("images", f"[batch, 3, {side}, {side}]", tuple(images.shape))
        # Without blocks and norm, timm's forward pass is the embedding alone.
        tokens: Tensor = self.trunk.forward_features(images)
        return tokens

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Compute the smashed data.

        Args:
            images: [B, 3, S, S].
            prompts: [P, D], or deep ones [L, P, D] for L blocks; None: no prompts.

        Returns:
            [B, prefix + P + N, D] with prompts. Without them [B, prefix + N, D], where N is
            `keep_tokens` if tokens are merged.

        Raises:
            TokenCountError: a shape that the plan does not allow.
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
    """Whether the tensor of this name is added to timm's model (adapter or LoRA)."""
    return name.startswith(ADAPTER) or is_lora(name)
