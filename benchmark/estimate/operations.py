"""What parts compute, by torch's own counter on the meta device; blocks alike are counted once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from split_model import Head, Tail

# Two blocks of one kind compute the same: parameters' names, shapes and whether they are tuned,
# and whether something ahead of the block is tuned too, so that it passes a gradient on.
_Kind = tuple[bool, tuple[tuple[str, tuple[int, ...], bool], ...]]


def embedding_flops(head: Head) -> int:
    """Of one image's way to the first block."""
    side = head.settings.image_size
    images = torch.empty(1, 3, side, side, device="meta")
    return _counted(lambda: head.embed(images))


def blocks_flops(head: Head, prompts: int = 0) -> int:
    """Of one image's tokens and so many prompts through the head's blocks: forward, and backward.

    Backward as far as something is tuned: no block does what no gradient asks for.
    """
    total, passes = 0, False
    known: dict[_Kind, int] = {}
    for number, block in head.blocks.items():
        kind = _kind(block, passes=passes)
        if kind not in known:
            known[kind] = _one_block(head, number, prompts, passes=passes)
        total += known[kind]
        passes = passes or is_tuned(block)
    return total


def output_flops(tail: Tail, prompts: int = 0, *, passes: bool = False) -> int:
    """Of one image's features through the tail, and back where it or something ahead is tuned."""
    features = _tokens(tail.sizes.tokens + prompts, tail.sizes.width, passes=passes)
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    return _counted(lambda: F.cross_entropy(tail(features), labels))


def is_tuned(module: nn.Module) -> bool:
    """Whether a gradient is asked for by one of its parameters."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _one_block(head: Head, number: str, prompts: int, *, passes: bool) -> int:
    tokens = _tokens(head.sizes.tokens + prompts, head.sizes.width, passes=passes)
    every_block = head.blocks
    head.blocks = nn.ModuleDict({number: every_block[number]})
    try:
        return _counted(lambda: head.run(tokens, prompts))
    finally:
        head.blocks = every_block


def _kind(block: nn.Module, *, passes: bool) -> _Kind:
    parameters = block.named_parameters()
    return passes, tuple((name, tuple(own.shape), own.requires_grad) for name, own in parameters)


def _tokens(count: int, width: int, *, passes: bool) -> Tensor:
    return torch.empty(1, count, width, device="meta", requires_grad=passes)


def _counted(step: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        result = step()
        if result.requires_grad:
            result.backward(torch.empty_like(result))
    return int(counter.get_total_flops())
