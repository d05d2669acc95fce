"""What the methods ask of a model: numbers, operations and blocks, found on the meta device."""

from __future__ import annotations

import dataclasses
import functools
import math

from torch import nn

from benchmark.estimate.operations import blocks_flops, embedding_flops, output_flops
from split_model import (
    Head,
    PartBytes,
    SplitSettings,
    Tail,
    anatomy,
    part_bytes,
    prompt_shape,
    skeleton,
)
from split_model.local_body import LocalBody

_CLASSIFIERS = ("head.", "head_dist.")  # timm's names
_BIASES = frozenset({"bias", "q_bias", "k_bias", "v_bias"})


@functools.lru_cache(maxsize=64)
def _part_bytes(settings: SplitSettings) -> PartBytes:
    return part_bytes(settings)


def bytes_of(settings: SplitSettings) -> PartBytes:
    """Numbers in head, body, tail, prompts and the uncut model."""
    # The parts do not depend on the prompts, and methods differ in little else.
    bare = _part_bytes(_bare(settings))
    return dataclasses.replace(bare, prompts=math.prod(prompt_shape(settings)))


def local_body_numbers(settings: SplitSettings) -> int:
    """Numbers of the small body that the local update runs through; 0 where there is none."""
    if not settings.local_body:
        return 0
    return sum(tensor.numel() for tensor in LocalBody(settings).state_dict().values())


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Operations of the forward pass for one image."""

    embedding: int  # ahead of the first block
    block: int  # of one; all are alike
    output: int  # norm, pooling and classifier
    depth: int  # blocks in all

    @property
    def behind_embedding(self) -> int:
        """Of all blocks and the output."""
        return self.depth * self.block + self.output

    @property
    def whole(self) -> int:
        """Of the whole model."""
        return self.embedding + self.behind_embedding


def forward_flops(settings: SplitSettings, prompts: int = 0) -> ForwardFlops:
    """What the backbone computes, with so many prompts in every block, wherever they joined."""
    return _forward_flops(_uncut(settings), prompts)


@functools.lru_cache(maxsize=64)
def _forward_flops(uncut: SplitSettings, prompts: int) -> ForwardFlops:
    depth = anatomy(uncut).depth
    # Every block is in the head, and nothing is tuned there.
    whole = dataclasses.replace(uncut, cut=depth, prompt_count=prompts)
    head, tail = Head(whole).requires_grad_(False), Tail(whole).requires_grad_(False)
    return ForwardFlops(
        embedding=embedding_flops(head),
        block=blocks_flops(head, prompts) // depth,
        output=output_flops(tail, prompts),
        depth=depth,
    )


def _bare(settings: SplitSettings) -> SplitSettings:
    return dataclasses.replace(
        settings,
        prompt_at="input",
        prompt_depth="shallow",
        prompt_count=0,
        local_body=0,
        keep_tokens=0,
    )


def _uncut(settings: SplitSettings) -> SplitSettings:
    return dataclasses.replace(_bare(settings), cut=0, tail_blocks=0, tune="tail", tune_body=False)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers that can be trained in the whole model."""

    every: int
    classifier: int
    classifier_weights: int  # of these, the factors of a matrix product
    other_biases: int  # of all layers ahead of the classifier

    @property
    def classifier_flops(self) -> int:
        """Of the classifier's forward pass, for one image: a product and a sum for each weight."""
        return 2 * self.classifier_weights


def parameters(settings: SplitSettings) -> Parameters:
    """The parameters of the uncut model with the settings' classes."""
    return _parameters(_uncut(settings))


@functools.lru_cache(maxsize=64)
def _parameters(settings: SplitSettings) -> Parameters:
    every = classifier = weights = biases = 0
    for name, parameter in skeleton(settings).named_parameters():
        count = parameter.numel()
        every += count
        if name.startswith(_CLASSIFIERS):
            classifier += count
            weights += count if parameter.ndim > 1 else 0
        elif name.rpartition(".")[2] in _BIASES:
            biases += count
    return Parameters(every, classifier, weights, biases)


@dataclasses.dataclass(frozen=True)
class BlockWidths:
    """Numbers per token in one block's linear layers."""

    outputs: int  # of all of them together
    inputs: int
    widest: int  # the largest output


def block_widths(settings: SplitSettings) -> BlockWidths:
    """The widths of the first block; those of a vision transformer are all alike."""
    return _block_widths(_uncut(settings))


@functools.lru_cache(maxsize=64)
def _block_widths(settings: SplitSettings) -> BlockWidths:
    model = skeleton(settings)
    blocks = model.get_submodule("blocks")
    layers = [m for m in next(blocks.children()).modules() if isinstance(m, nn.Linear)]
    return BlockWidths(
        outputs=sum(layer.out_features for layer in layers),
        inputs=sum(layer.in_features for layer in layers),
        widest=max(layer.out_features for layer in layers),
    )
