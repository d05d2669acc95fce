"""A small frozen stand-in for the body, on the device: the local update runs through it.

SFPrompt's local-loss update (arXiv 2407.17533, section 3) goes from the head straight to the tail:
the tail learns from features that no body has made. With `local_body` blocks between them, which
the server distils from the body's, it learns from nearly the body's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protocol.distillation import DistillationSettings
from protocol.plan import ModelPlan
from split_model.backbone.architecture import body_blocks, evenly
from split_model.parts.base import POSITIONS, Part
from split_model.parts.build import build_body, build_head
from tuning_methods.proxies.distillation import distil

_BATCH = 64


class LocalBody(Part):
    """Smashed data to something like features. Its blocks have the first numbers of the body's."""

    def __init__(self, settings: ModelPlan) -> None:
        blocks = range(settings.cut, settings.cut + settings.local_body)
        super().__init__(settings, blocks, POSITIONS)

    def forward(self, smashed: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]. Raises `TokenCountError`."""
        return self.run(smashed, self.prompt_tokens(smashed, "smashed data"))


def build_local_body(settings: ModelPlan, tensors: Mapping[str, Tensor]) -> LocalBody:
    """It, frozen, float32 on the CPU. Raises `WeightsMismatchError`."""
    body = LocalBody(settings)
    body.fill(tensors)
    return body


def local_body_weights(
    settings: ModelPlan,
    weights: Mapping[str, Tensor],
    images: Tensor,
    how: DistillationSettings,
    seed: int,
) -> dict[str, Tensor]:
    """Its tensors: of blocks that lie evenly in the body, distilled where ``how`` asks for it.

    The body's blocks are divided into as many equal shares as it has blocks. Each begins as the
    middle one of its share and is taught what the share's last one makes, without prompts.

    Args:
        weights: of the backbone, by timm's names.
        images: [N, 3, S, S], prepared for the backbone.

    Raises `ModelPlanError` or `WeightsMismatchError`.
    """
    blocks, count, first = body_blocks(settings), settings.local_body, settings.cut
    sources = evenly(blocks, count)
    start: dict[str, Tensor] = {}
    for name in LocalBody(settings).names():
        _, number, rest = name.split(".", 2)
        start[name] = weights[f"blocks.{sources[int(number) - first]}.{rest}"]
    pupil = build_local_body(settings, start)
    if how.epochs:
        lasts = [blocks[(place + 1) * len(blocks) // count - 1] for place in range(count)]
        pairs = [(str(last), str(first + place)) for place, last in enumerate(lasts)]
        smashed = _smashed(settings, weights, images)
        body = build_body(settings, weights)
        distil(body, pupil, pairs, list(pupil.parameters()), smashed, how, seed)
    return {name: tensor.detach().clone() for name, tensor in pupil.state_dict().items()}


@torch.no_grad()
def _smashed(settings: ModelPlan, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    # Without what is tuned of the head: the backbone's own, as the run begins.
    head = build_head(settings.untuned(), weights)
    return torch.cat([head(batch) for batch in images.split(_BATCH)])
