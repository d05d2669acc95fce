"""The body: the blocks between head and tail, on the server; frozen or tuned there."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import body_blocks
from split_model.errors import TokenCountError
from split_model.layers.prompts import insert_prompts, prompt_shape
from split_model.parts.base import POSITIONS, Part
from split_model.parts.depths import pool_depth, read_blocks


class Body(Part):
    """Computes features from smashed data. Stateless between calls, so threads may share it.

    Gradients flow to the prompts and, with `tune_body`, to all parameters.
    """

    def __init__(self, settings: ModelPlan) -> None:
        super().__init__(settings, body_blocks(settings), POSITIONS)

    def forward(
        self, smashed: Tensor, prompts: Tensor | None = None, num_tokens: int | None = None
    ) -> Tensor:
        """Compute the features.

        Args:
            smashed: [B, T, D].
            prompts: with `prompt_at` = cut, [L, P, D] for the whole batch, or [B, L, P, D] for a
                batch of several participants; L is 1 (shallow) or the number of blocks (deep).
            num_tokens: compute only this many leading tokens; None: all.

        Returns:
            [B, T', D], where T' is T, plus P with such prompts; or [B, num_tokens, D]. With
            ``depths`` [B, R, D], R as `read_tokens` returns.

        Raises:
            TokenCountError: a shape that the plan does not allow.
        """
        inside = self.prompt_tokens(smashed, "smashed data")
        if self.settings.depths:
            return self._read_depths(smashed, prompts, inside)
        if prompts is None:
            return self.run(smashed, inside, num_tokens=num_tokens)
        self._check_prompts(smashed, prompts, inside)
        if self.settings.prompt_depth == "deep":
            return self.run_deep(smashed, prompts, num_tokens=num_tokens)
        tokens = insert_prompts(smashed, prompts[..., 0, :, :], self.sizes.prefix)
        return self.run(tokens, prompts.shape[-2], num_tokens=num_tokens)

    def _read_depths(self, smashed: Tensor, prompts: Tensor | None, inside: int) -> Tensor:
        """Compute what a tail with ``depths`` reads, [B, R, D]."""
        wanted, read = set(read_blocks(self.settings)), []
        numbers = iter(body_blocks(self.settings))

        def read_after(tokens: Tensor) -> Tensor:
            if next(numbers) in wanted:
                read.append(pool_depth(tokens, self.sizes))
            return tokens

        if prompts is None:
            self.run(smashed, inside, read_after)
        else:
            self._check_prompts(smashed, prompts, inside)
            if self.settings.prompt_depth == "deep":
                self.run_deep(smashed, prompts, read_after)
            else:
                tokens = insert_prompts(smashed, prompts[..., 0, :, :], self.sizes.prefix)
                self.run(tokens, prompts.shape[-2], read_after)
        return torch.cat(read, dim=1)

    def _tunes(self, name: str, *, parameter: bool) -> bool:
        return parameter and self.settings.tune_body

    def _check_prompts(self, smashed: Tensor, prompts: Tensor, inside: int) -> None:
        given = tuple(prompts.shape)
        if self.settings.prompt_at != "cut" or inside:
            raise TokenCountError("prompts", "absent: the smashed data hold them", given)
        expected = prompt_shape(self.settings)
        if given not in (expected, (smashed.shape[0], *expected)):
            limit = f"of shape {list(expected)} or {[int(smashed.shape[0]), *expected]}"
            raise TokenCountError("prompts", limit, given)
