"""How a device computes a head: what names and shapes of its tensors leave open.

The server describes the backbone once, in the head file's metadata. With this map and section 6 of
SPEC.md a device needs no library of vision models.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.base import Message

__all__ = ["Architecture", "Rotary"]

Size = Annotated[int, Field(ge=1, le=65_536)]

Epsilon = Annotated[float, Field(gt=0, lt=1)]

Angles = Annotated[tuple[float, ...], Field(max_length=4096)]


class Rotary(Message):
    """Rotary positions: queries and keys of image tokens are turned, pair by pair.

    The patch in row y and column x turns the pair j by ``start[j] + y·row[j] + x·column[j]``
    radians. Learned angles are in the tensor ``rope.freqs`` instead, [2, depth, heads, pairs]: for
    each block and head, those of ``learned``'s first word, then those of the other.
    """

    layout: Literal["interleaved", "half"] = Field(
        description="pair j: elements 2j and 2j + 1 | j and j + pairs"
    )
    learned: Literal["column-row", "row-column"] | None = None
    start: Angles = ()
    row: Angles = ()
    column: Angles = ()


class Architecture(Message):
    """A plain vision transformer, as far as its tensors do not tell.

    Attributes:
        depth: blocks of the whole backbone.
        patch: height and width of a patch, in pixels.
        grid: rows and columns of patches.
        prefix: names of the tensors with the tokens before the image tokens, in order.
        prefix_tokens: their tokens.
        heads: of attention.
    """

    depth: Size
    width: Size
    patch: tuple[Size, Size]
    grid: tuple[Size, Size]
    prefix: tuple[Literal["cls_token", "dist_token", "reg_token"], ...] = ()
    prefix_tokens: int = Field(ge=0, le=4096)
    positions: Literal["none", "patches", "all"] = Field(
        description="the tokens that pos_embed is added to"
    )
    heads: Size
    norm: Literal["layer", "rms"]
    epsilon: Epsilon = Field(description="of the norms in blocks")
    first_epsilon: Epsilon = Field(description="of norm_pre and patch_embed.norm, where there are")
    activation: Literal["gelu", "gelu-tanh", "gelu-quick", "silu"]
    gate: Literal["none", "first", "last"] = Field(
        "none",
        description="the half of fc1's outputs that is activated, and multiplies the other; with "
        "fc1_g and fc1_x: first, of these two in order",
    )
    norm_after: bool = Field(
        False, description="a block's norms follow attention and MLP, in place of preceding them"
    )
    rotary: Rotary | None = None
    relative: bool = Field(
        False, description="attention has biases by relative position, in tables"
    )

    @property
    def patches(self) -> int:
        """The number of image tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """The number of tokens of an image."""
        return self.prefix_tokens + self.patches
