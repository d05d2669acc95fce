"""The memory of a device that trains, by formula.

bytes = 4 · (weights + 3 · trained + batch · activations)

The 3 are a gradient and AdamW's two moments for each trained number. Activations are numbers per
image: what autograd keeps of the blocks for the backward pass. With T tokens of width D, and the
linear layers of a block (attention's three inputs, its projection, the two of the MLP) taking
`inputs` and giving `outputs` numbers per token in all:

- a frozen block that a gradient passes: T · (outputs + D). Each layer's output is the input of a
  norm, of attention or of the activation function, and attention keeps its own output too.
- a trained block: T · (outputs + inputs), as the gradient of a weight needs the layer's input.
- frozen blocks that no gradient passes: T · (D + 2 · widest) once, for they run one after the
  other; the residual, and the widest layer's output on both sides of the activation function.

Attention is taken as fused (no T x T scores are kept); statistics of norms and scales of layers
are left out, being small.
"""

from __future__ import annotations

from benchmark.estimate.payload import FLOAT_BYTES
from benchmark.estimate.sizes import block_widths
from split_model import SplitSettings, anatomy


def peak_bytes(weights: int, trained: int, batch_size: int, activations: int) -> int:
    """The formula above; all but ``batch_size`` in numbers, activations of one image."""
    return FLOAT_BYTES * (weights + 3 * trained + batch_size * activations)


def image_numbers(settings: SplitSettings) -> int:
    """Numbers of one image as the model takes it."""
    return 3 * settings.image_size**2


def passed_blocks(settings: SplitSettings, blocks: int, tokens: int) -> int:
    """Numbers kept of frozen blocks that a gradient passes, for one image of so many tokens."""
    widths = block_widths(settings)
    return blocks * tokens * (widths.outputs + anatomy(settings).width)


def trained_blocks(settings: SplitSettings, blocks: int, tokens: int) -> int:
    """Numbers kept of trained blocks, for one image of so many tokens."""
    widths = block_widths(settings)
    return blocks * tokens * (widths.outputs + widths.inputs)


def run_blocks(settings: SplitSettings, blocks: int, tokens: int) -> int:
    """Numbers alive at one time in blocks that no gradient passes, for one image."""
    if not blocks:
        return 0
    return tokens * (anatomy(settings).width + 2 * block_widths(settings).widest)
