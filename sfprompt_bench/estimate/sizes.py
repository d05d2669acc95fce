"""What the methods ask of a model: numbers, operations and blocks, found on the meta device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from protocol.codec_names import parse_codec
from protocol.codecs import encoded_bytes
from protocol.errors import InvalidField
from protocol.plan import ModelPlan
from split_model import (
    Head,
    PartBytes,
    Tail,
    anatomy,
    part_bytes,
    prompt_shape,
    skeleton,
)
from split_model.proxies.local_body import LocalBody

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


_CLASSIFIERS = ("head.", "head_dist.")  # timm's names

_BIASES = frozenset({"bias", "q_bias", "k_bias", "v_bias"})


@functools.lru_cache(maxsize=64)
def _part_bytes(settings: ModelPlan) -> PartBytes:
    return part_bytes(settings)


def bytes_of(settings: ModelPlan) -> PartBytes:
    """Numbers in head, body, tail, prompts and the uncut model."""
    # The parts do not depend on the prompts, and methods differ in little else.
    bare = _part_bytes(_bare(settings))
    return dataclasses.replace(bare, prompts=math.prod(prompt_shape(settings)))


def local_body_numbers(settings: ModelPlan) -> int:
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


def forward_flops(settings: ModelPlan, prompts: int = 0) -> ForwardFlops:
    """What the backbone computes, with so many prompts in every block, wherever they joined."""
    return _forward_flops(_uncut(settings), prompts)


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


def _bare(settings: ModelPlan) -> ModelPlan:
    return settings.replace(
        prompt_at="input",
        prompt_depth="shallow",
        prompt_count=0,
        local_body=0,
        keep_tokens=0,
    )


def _uncut(settings: ModelPlan) -> ModelPlan:
    return _bare(settings).replace(cut=0, tail_blocks=0, tune="tail", tune_body=False)


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


def parameters(settings: ModelPlan) -> Parameters:
    """The parameters of the uncut model with the settings' classes."""
    return _parameters(_uncut(settings))


@functools.lru_cache(maxsize=64)
def _parameters(settings: ModelPlan) -> Parameters:
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


def block_widths(settings: ModelPlan) -> BlockWidths:
    """The widths of the first block; those of a vision transformer are all alike."""
    return _block_widths(_uncut(settings))


@functools.lru_cache(maxsize=64)
def _block_widths(settings: ModelPlan) -> BlockWidths:
    model = skeleton(settings)
    blocks = model.get_submodule("blocks")
    layers = [m for m in next(blocks.children()).modules() if isinstance(m, nn.Linear)]
    return BlockWidths(
        outputs=sum(layer.out_features for layer in layers),
        inputs=sum(layer.in_features for layer in layers),
        widest=max(layer.out_features for layer in layers),
    )


FLOAT_BYTES = 4  # of a float32

Shape = tuple[int, ...]


def tensor_bytes(codec: str, shape: Shape) -> int:
    """The payload of one tensor; with a codec that compresses without loss, at most.

    Raises:
        UnknownCodec: there is no such codec.
        InvalidField: with this codec the size depends on the values.
    """
    found = encoded_bytes(_uncompressed(codec), shape)
    if found is None:
        raise InvalidField(
            "the size of this codec's payload depends on the values", field="codec", value=codec
        )
    return found


def tensors_bytes(codec: str, shapes: Iterable[Shape]) -> int:
    """The payload of several tensors, each encoded by itself. Raises as `tensor_bytes`."""
    return sum(tensor_bytes(codec, shape) for shape in shapes)


def samples_bytes(codec: str, samples: int, batch_size: int, shape: Shape) -> int:
    """The payload of so many samples of this shape, sent in batches. Raises as `tensor_bytes`."""
    full, rest = divmod(samples, batch_size)
    total = full * tensor_bytes(codec, (batch_size, *shape)) if full else 0
    return total + (tensor_bytes(codec, (rest, *shape)) if rest else 0)


def _uncompressed(codec: str) -> str:
    """What lossless compression saves depends on the values: it is counted as saving nothing."""
    parts = parse_codec(codec)
    return parts.base if parts.parameter is None else f"{parts.base}:{parts.parameter}"


def peak_bytes(weights: int, trained: int, batch_size: int, activations: int) -> int:
    """The formula above; all but ``batch_size`` in numbers, activations of one image."""
    return FLOAT_BYTES * (weights + 3 * trained + batch_size * activations)


def image_numbers(settings: ModelPlan) -> int:
    """Numbers of one image as the model takes it."""
    return 3 * settings.image_size**2


def passed_blocks(settings: ModelPlan, blocks: int, tokens: int) -> int:
    """Numbers kept of frozen blocks that a gradient passes, for one image of so many tokens."""
    widths = block_widths(settings)
    return blocks * tokens * (widths.outputs + anatomy(settings).width)


def trained_blocks(settings: ModelPlan, blocks: int, tokens: int) -> int:
    """Numbers kept of trained blocks, for one image of so many tokens."""
    widths = block_widths(settings)
    return blocks * tokens * (widths.outputs + widths.inputs)


def run_blocks(settings: ModelPlan, blocks: int, tokens: int) -> int:
    """Numbers alive at one time in blocks that no gradient passes, for one image."""
    if not blocks:
        return 0
    return tokens * (anatomy(settings).width + 2 * block_widths(settings).widest)
