"""The head: patch embedding and the first `cut` blocks, on the device, frozen."""

import torch
from torch import Tensor

from split_model.part import EMBEDDING, POSITIONS, Part, TokenCountError
from split_model.prompts import insert_prompts
from split_model.settings import SplitSettings
from split_model.token_merging import merge_tokens


class Head(Part):
    """Images to smashed data. Parameters are frozen; gradients flow to the prompts."""

    def __init__(self, settings: SplitSettings) -> None:
        super().__init__(settings, range(settings.cut), EMBEDDING | POSITIONS)

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

        Without prompts T is prefix + N, with `keep_tokens` image tokens in place of N.
        Raises `TokenCountError`.
        """
        tokens = self.embed(images)
        if prompts is None:
            return self._merged(self.run(tokens, 0))
        expected = (self.settings.prompt_count, self.sizes.width)
        if tuple(prompts.shape) != expected:
            raise TokenCountError("prompts", f"of shape {list(expected)}", tuple(prompts.shape))
        return self.run(insert_prompts(tokens, prompts, self.sizes.prefix), expected[0])

    def _merged(self, tokens: Tensor) -> Tensor:
        keep, prefix = self.settings.keep_tokens, self.sizes.prefix
        if not keep:
            return tokens
        return torch.cat([tokens[:, :prefix], merge_tokens(tokens[:, prefix:], keep)], dim=1)
