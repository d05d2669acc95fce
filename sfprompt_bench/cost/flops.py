"""Floating-point operations of a model's parts, counted on the meta device for one image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from protocol.plan import ModelPlan
from sfprompt_bench.cost.sizes import uncut_settings
from split_model.backbone.architecture import anatomy
from split_model.parts.body import Body
from split_model.parts.head import Head
from split_model.parts.tail import Tail

# Blocks of one kind cost the same: equal names, shapes and tuning of their parameters, and equal
# need for an input gradient, which exists where something before the block is tuned.
_BlockKind = tuple[bool, tuple[tuple[str, tuple[int, ...], bool], ...]]


def count_flops(step: Callable[[], Tensor]) -> int:
    """Count the operations of a forward pass and, if its result needs one, the backward pass.

    Matrix products, convolutions and attention count; a multiplication and its addition are two.
    `torch.autograd.grad` would not be counted, `backward` is.
    """
    with FlopCounterMode(display=False) as counter:
        result = step()
        if result.requires_grad:
            result.backward(torch.empty_like(result))
    return int(counter.get_total_flops())


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Operations of the forward pass for one image."""

    embedding: int  # before the first block
    block: int  # of one block; all blocks are alike
    output: int  # norm, pooling and classifier
    depth: int  # number of blocks

    @property
    def after_embedding(self) -> int:
        """Operations of all blocks and the output."""
        return self.depth * self.block + self.output

    @property
    def whole(self) -> int:
        """Operations of the whole model."""
        return self.embedding + self.after_embedding


def forward_flops(settings: ModelPlan, prompts: int = 0) -> ForwardFlops:
    """Count the backbone's forward pass with ``prompts`` extra tokens in every block."""
    return _forward_flops(uncut_settings(settings), prompts)


@functools.lru_cache(maxsize=64)
def _forward_flops(uncut: ModelPlan, prompts: int) -> ForwardFlops:
    depth = anatomy(uncut).depth
    # Every block is in the head, and nothing is tuned there.
    whole = uncut.replace(cut=depth, prompt_count=prompts)
    head, tail = Head(whole).requires_grad_(False), Tail(whole).requires_grad_(False)
    return ForwardFlops(
        embedding=embedding_flops(head),
        block=blocks_flops(head, prompts) // depth,
        output=output_flops(tail, prompts),
        depth=depth,
    )


def embedding_flops(head: Head) -> int:
    """Count the operations from one image to the first block."""
    side = head.settings.image_size
    images = torch.empty(1, 3, side, side, device="meta")
    return count_flops(lambda: head.embed(images))


def blocks_flops(head: Head, prompts: int = 0) -> int:
    """Count the head's blocks, forward and backward, for one image's tokens and the prompts.

    The backward pass ends at the first tuned block, as autograd's does.
    """
    total, needs_gradient = 0, False
    known: dict[_BlockKind, int] = {}
    for number, block in head.blocks.items():
        kind = _kind(block, needs_gradient=needs_gradient)
        if kind not in known:
            known[kind] = _block_flops(head, number, prompts, needs_gradient=needs_gradient)
        total += known[kind]
        needs_gradient = needs_gradient or is_tuned(block)
    return total


def output_flops(tail: Tail, prompts: int = 0, *, needs_gradient: bool = False) -> int:
    """Count the tail for one image's features; backward if it or something before it is tuned."""
    features = _tokens(tail.sizes.tokens + prompts, tail.sizes.width, needs_gradient)
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    return count_flops(lambda: F.cross_entropy(tail(features), labels))


def body_step_flops(settings: ModelPlan, tokens: int) -> int:
    """Count a frozen body's forward pass and input gradient for one image of ``tokens`` tokens."""
    body = Body(settings).requires_grad_(False)
    smashed = _tokens(tokens, body.sizes.width, True)
    return count_flops(lambda: body(smashed))


def is_tuned(module: nn.Module) -> bool:
    """Whether one of the module's parameters needs a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _block_flops(head: Head, number: str, prompts: int, *, needs_gradient: bool) -> int:
    tokens = _tokens(head.sizes.tokens + prompts, head.sizes.width, needs_gradient)
    all_blocks = head.blocks
    head.blocks = nn.ModuleDict({number: all_blocks[number]})
    try:
        return count_flops(lambda: head.run(tokens, prompts))
    finally:
        head.blocks = all_blocks


def _kind(block: nn.Module, *, needs_gradient: bool) -> _BlockKind:
    return needs_gradient, tuple(
        (name, tuple(parameter.shape), parameter.requires_grad)
        for name, parameter in block.named_parameters()
    )


def _tokens(count: int, width: int, needs_gradient: bool) -> Tensor:
    return torch.empty(1, count, width, device="meta", requires_grad=needs_gradient)
