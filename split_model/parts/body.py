"""The body: the blocks between head and tail, on the server; frozen, or tuned there."""

from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import body_blocks
from split_model.errors import TokenCountError
from split_model.layers.prompts import insert_prompts, prompt_shape
from split_model.parts.base import POSITIONS, Part


class Body(Part):
    """Smashed data to features. It keeps nothing between calls, so threads may share it.

    Gradients flow to the prompts, and with `tune_body` to every parameter.
    """

    def __init__(self, settings: ModelPlan) -> None:
        super().__init__(settings, body_blocks(settings), POSITIONS)

    def forward(
        self, smashed: Tensor, prompts: Tensor | None = None, num_tokens: int | None = None
    ) -> Tensor:
        """[B, T, D] to features [B, T', D], or to their first ``num_tokens`` tokens.

        `prompts`, where they join at the cut: [L, P, D] for the whole batch, or [B, L, P, D] for
        a batch of several participants; L is 1 (shallow) or the number of body blocks (deep).
        T' is T, and P more with such prompts. Raises `TokenCountError`.
        """
        inside = self.prompt_tokens(smashed, "smashed data")
        if prompts is None:
            return self.run(smashed, inside, num_tokens=num_tokens)
        self._check_prompts(smashed, prompts, inside)
        if self.settings.prompt_depth == "deep":
            return self.run_deep(smashed, prompts, num_tokens=num_tokens)
        tokens = insert_prompts(smashed, prompts[..., 0, :, :], self.sizes.prefix)
        return self.run(tokens, prompts.shape[-2], num_tokens=num_tokens)

    def _tunes(self, name: str, *, parameter: bool) -> bool:
        return parameter and self.settings.tune_body

    def _check_prompts(self, smashed: Tensor, prompts: Tensor, inside: int) -> None:
        given = tuple(prompts.shape)
        if self.settings.prompt_at != "cut" or inside:
            raise TokenCountError("prompts", "absent: they are in the smashed data", given)
        one = prompt_shape(self.settings)
        if given not in (one, (smashed.shape[0], *one)):
            limit = f"of shape {list(one)} or {[int(smashed.shape[0]), *one]}"
            raise TokenCountError("prompts", limit, given)
