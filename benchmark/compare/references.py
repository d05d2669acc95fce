"""The model of a run in one process, with the prompts where the run has them."""

from __future__ import annotations

from torch import Tensor

from benchmark.centralised import Centralised


class Uncut(Centralised):
    """Head, body and tail on one heap of data, for either placement of the prompts."""

    @property
    def trainable_parameters(self) -> int:
        tail = sum(weight.numel() for weight in self.tail.parameters())
        return tail + (0 if self.prompts is None else self.prompts.numel())

    def _features(self, images: Tensor, prompts: Tensor | None) -> Tensor:
        if self.settings.model.prompt_at == "input":
            return super()._features(images, prompts)
        features: Tensor = self.body(self.head(images), prompts)
        return features
