"""Numbers in a model, bytes of encoded tensors and the memory of one training step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

from torch import nn

from protocol.codec_names import parse_codec
from protocol.codecs import encoded_bytes
from protocol.errors import InvalidField
from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, skeleton
from split_model.checkpoints.head_file import EXTRA, HeadDtype, packed_bytes
from split_model.layers.prompts import prompt_shape
from split_model.parts.cost import PartBytes, part_bytes
from split_model.parts.head import Head
from tuning_methods.sfprompt.local_body import LocalBody

FLOAT_BYTES = 4  # of a float32

Shape = tuple[int, ...]

# Bits a value of `klt:Q` on smashed data: this at Q = 1, and its growth with Q.
_KLT_BITS, _KLT_POWER = 1.1, -0.8

_CLASSIFIERS = ("head.", "head_dist.")  # timm's names

_BIASES = frozenset({"bias", "q_bias", "k_bias", "v_bias"})


def part_numbers(settings: ModelPlan) -> PartBytes:
    """Count the numbers in head, body, tail, prompts and the uncut model."""
    # The parts do not depend on the prompts, and methods differ in little else.
    unprompted = _part_numbers(_unprompted_settings(settings))
    return dataclasses.replace(unprompted, prompts=math.prod(prompt_shape(settings)))


@functools.lru_cache(maxsize=64)
def _part_numbers(settings: ModelPlan) -> PartBytes:
    return part_bytes(settings)


def local_body_numbers(settings: ModelPlan, num_blocks: int) -> int:
    """Count the numbers in the small body of the local update; 0 without one."""
    if not num_blocks:
        return 0
    return sum(tensor.numel() for tensor in LocalBody(settings, num_blocks).state_dict().values())


def head_bytes(settings: ModelPlan, dtype: HeadDtype, local_blocks: int = 0) -> int:
    """Calculate the payload of a head file, without its header.

    Args:
        settings: the model's plan.
        dtype: of the file, `wire.head`.
        local_blocks: blocks of the small body of the local update.
    """
    return _head_bytes(_unprompted_settings(settings), dtype, local_blocks)


@functools.lru_cache(maxsize=64)
def _head_bytes(settings: ModelPlan, dtype: HeadDtype, local_blocks: int) -> int:
    tensors = dict(Head(settings).state_dict())
    if local_blocks:
        body = LocalBody(settings, local_blocks).state_dict()
        tensors |= {EXTRA + name: tensor for name, tensor in body.items()}
    return packed_bytes(tensors, dtype)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of the whole model that can be trained."""

    total: int
    classifier: int
    classifier_weights: int  # of the classifier's numbers, those in matrix products
    other_biases: int  # of all layers before the classifier

    @property
    def classifier_flops(self) -> int:
        """Operations of the classifier's forward pass for one image, two for each weight."""
        return 2 * self.classifier_weights


def parameter_counts(settings: ModelPlan) -> ParameterCounts:
    """Count the parameters of the uncut model with the settings' classes."""
    return _parameter_counts(uncut_settings(settings))


@functools.lru_cache(maxsize=64)
def _parameter_counts(settings: ModelPlan) -> ParameterCounts:
    total = classifier = weights = biases = 0
    for name, parameter in skeleton(settings).named_parameters():
        count = parameter.numel()
        total += count
        if name.startswith(_CLASSIFIERS):
            classifier += count
            weights += count if parameter.ndim > 1 else 0
        elif name.rpartition(".")[2] in _BIASES:
            biases += count
    return ParameterCounts(total, classifier, weights, biases)


def uncut_settings(settings: ModelPlan) -> ModelPlan:
    """The settings of the whole pretrained model with a classifier: no cut and no prompts."""
    return _unprompted_settings(settings).replace(
        cut=0, tail_blocks=0, tune="tail", tune_body=False
    )


def _unprompted_settings(settings: ModelPlan) -> ModelPlan:
    return settings.replace(
        prompt_at="input",
        prompt_depth="shallow",
        prompt_count=0,
        keep_tokens=0,
    )


def tensor_bytes(codec: str, shape: Shape) -> int:
    """Calculate one tensor's payload.

    Lossless compression depends on the values and counts as saving nothing. The bytes of ``klt``
    are estimated from those of smashed data, which docs/results.md lists.

    Raises:
        UnknownCodec: there is no such codec.
        InvalidField: with this codec the size depends on the values.
    """
    parts = parse_codec(codec)
    plain = parts.base if parts.parameter is None else f"{parts.base}:{parts.parameter}"
    if parts.base == "klt" and parts.parameter is not None:
        bits: float = _KLT_BITS * float(parts.parameter) ** _KLT_POWER
        return math.ceil(min(32.0, bits) * math.prod(shape) / 8)
    nbytes = encoded_bytes(plain, shape)
    if nbytes is None:
        raise InvalidField(
            "the size of this codec's payload depends on the values",
            field="codec",
            value=codec,
            hint="calculate with a codec of fixed size, such as int8",
        )
    return nbytes


def tensors_bytes(codec: str, shapes: Iterable[Shape]) -> int:
    """Calculate the payload of several tensors, encoded one by one. Raises as `tensor_bytes`."""
    return sum(tensor_bytes(codec, shape) for shape in shapes)


def samples_bytes(codec: str, samples: int, batch_size: int, shape: Shape) -> int:
    """Calculate the payload of samples of one shape, sent in batches. Raises as `tensor_bytes`."""
    batches, rest = divmod(samples, batch_size)
    total = batches * tensor_bytes(codec, (batch_size, *shape)) if batches else 0
    return total + (tensor_bytes(codec, (rest, *shape)) if rest else 0)


def peak_bytes(weights: int, trained: int, batch_size: int, activations: int) -> int:
    """Calculate the memory of a training step in float32.

    Args:
        weights: numbers in the model.
        trained: numbers that are trained: each has a gradient and AdamW's two moments.
        batch_size: images in the batch.
        activations: numbers that autograd keeps for one image.
    """
    return FLOAT_BYTES * (weights + 3 * trained + batch_size * activations)


def image_numbers(settings: ModelPlan) -> int:
    """Count the numbers of one image at the model's input."""
    return 3 * settings.image_size**2


@dataclasses.dataclass(frozen=True)
class BlockWidths:
    """Numbers per token in one block's linear layers."""

    outputs: int  # of all layers together
    inputs: int
    max_output: int


def block_widths(settings: ModelPlan) -> BlockWidths:
    """Read the widths of the first block; a vision transformer's blocks are all alike."""
    return _block_widths(uncut_settings(settings))


@functools.lru_cache(maxsize=64)
def _block_widths(settings: ModelPlan) -> BlockWidths:
    blocks = skeleton(settings).get_submodule("blocks")
    layers = [m for m in next(blocks.children()).modules() if isinstance(m, nn.Linear)]
    return BlockWidths(
        outputs=sum(layer.out_features for layer in layers),
        inputs=sum(layer.in_features for layer in layers),
        max_output=max(layer.out_features for layer in layers),
    )


def passed_blocks(settings: ModelPlan, blocks: int, tokens: int) -> int:
    """Count what autograd keeps of frozen blocks that pass a gradient on, for one image."""
    widths = block_widths(settings)
    return blocks * tokens * (widths.outputs + anatomy(settings).width)


def trained_blocks(settings: ModelPlan, blocks: int, tokens: int) -> int:
    """Count what autograd keeps of trained blocks, for one image."""
    widths = block_widths(settings)
    return blocks * tokens * (widths.outputs + widths.inputs)


def run_blocks(settings: ModelPlan, blocks: int, tokens: int) -> int:
    """Count the numbers alive at one time in blocks without a backward pass, for one image."""
    if not blocks:
        return 0
    return tokens * (anatomy(settings).width + 2 * block_widths(settings).max_output)
