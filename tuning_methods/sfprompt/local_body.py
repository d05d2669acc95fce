"""A small frozen replacement for the body, on the device, for the local-loss update.

SFPrompt's local-loss update (arXiv 2407.17533, section 3) connects the head directly to the tail,
so that the tail learns from features that no body computed. With `local_body` blocks between them,
which the server distils from the body's blocks, it learns from features close to the body's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, body_blocks
from split_model.errors import ModelPlanError
from split_model.parts.base import POSITIONS, Part
from split_model.parts.build import build_body, build_head
from tuning_methods.proxies.distillation import distil
from tuning_methods.proxies.settings import DistillationSettings
from tuning_methods.proxies.shapes import evenly

_BATCH = 64


def check_local_body(settings: ModelPlan, num_blocks: int) -> None:
    """Check that the model's body can be replaced by this number of blocks; 0: no replacement.

    Raises:
        ModelPlanError: it cannot.
    """
    if not num_blocks:
        return
    if anatomy(settings).family != "plain":
        limit = f"0 for {settings.backbone}: its blocks depend on positions"
        raise ModelPlanError("local_body", limit, num_blocks)
    limit_blocks = len(body_blocks(settings))
    if num_blocks > limit_blocks:
        limit = f"at most the {limit_blocks} blocks of the body"
        raise ModelPlanError("local_body", limit, num_blocks)


class LocalBody(Part):
    """Maps smashed data to approximate features. Its blocks are numbered as the body's first."""

    def __init__(self, settings: ModelPlan, num_blocks: int) -> None:
        check_local_body(settings, num_blocks)
        blocks = range(settings.cut, settings.cut + num_blocks)
        super().__init__(settings, blocks, POSITIONS)

    def forward(self, smashed: Tensor) -> Tensor:
        """Run smashed data [B, T, D] forward; return features [B, T, D].

        Raises:
            TokenCountError: the plan does not allow this number of tokens.
        """
        return self.run(smashed, self.prompt_tokens(smashed, "smashed data"))


def build_local_body(
    settings: ModelPlan, num_blocks: int, tensors: Mapping[str, Tensor]
) -> LocalBody:
    """Build the local body, frozen, float32 on the CPU.

    Raises:
        WeightsMismatchError: a tensor is missing or has another shape.
    """
    body = LocalBody(settings, num_blocks)
    body.fill(tensors)
    return body


def distil_local_body(
    num_blocks: int,
    settings: ModelPlan,
    weights: Mapping[str, Tensor],
    images: Tensor,
    distillation: DistillationSettings,
    seed: int,
) -> dict[str, Tensor]:
    """Copy a local body from the body, and distil it if ``distillation.epochs`` is above 0.

    The body's blocks are divided into equal shares, one for each local block, which starts as a
    copy of its share's middle block and learns to reproduce the share's last, without prompts.

    Args:
        num_blocks: blocks of the local body.
        settings: the model's plan.
        weights: the backbone's, by timm's names.
        images: [N, 3, S, S], preprocessed for the backbone.
        distillation: epochs, batch size and learning rate.
        seed: of the order of the images.

    Returns:
        The local body's tensors, as `build_local_body` takes them.

    Raises:
        ModelPlanError: the plan does not fit the backbone.
        WeightsMismatchError: a tensor is missing or has another shape.
    """
    blocks, first = body_blocks(settings), settings.cut
    sources = evenly(blocks, num_blocks)
    copies: dict[str, Tensor] = {}
    for name in LocalBody(settings, num_blocks).names():
        _, number, rest = name.split(".", 2)
        copies[name] = weights[f"blocks.{sources[int(number) - first]}.{rest}"]
    student = build_local_body(settings, num_blocks, copies)
    if distillation.epochs:
        ends = range(1, num_blocks + 1)
        lasts = [blocks[end * len(blocks) // num_blocks - 1] for end in ends]
        pairs = [(str(last), str(first + place)) for place, last in enumerate(lasts)]
        smashed = _compute_smashed(settings, weights, images)
        body = build_body(settings, weights)
        distil(body, student, pairs, list(student.parameters()), smashed, distillation, seed)
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


@torch.no_grad()
def _compute_smashed(settings: ModelPlan, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Compute smashed data [N, T, D] with the backbone's untuned head, as the run begins."""
    head = build_head(settings.untuned(), weights)
    return torch.cat([head(batch) for batch in images.split(_BATCH)])
