"""Scale pictures of more than 8 bits a channel to 8 bits.

Files rarely name the value of white. For integers from 0 to 65,535, white is the largest number of
the smallest depth (1, 2, 4, 8, 10, 12, 14 or 16 bits) that holds all numbers of the picture, so
that 12-bit data in a 16-bit file keep their brightness. For floats from 0 to 1, white is 1. All
other numbers are scaled so that the smallest becomes black and the largest white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16)

_LOW_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}  # the packing that swaps the two bytes

_TIFF_SAMPLE_FORMAT, _UNSIGNED = 339, 1


def is_wide(image: Image.Image) -> bool:
    """Whether the pixels of an image are numbers of 16 or 32 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def wide_values(image: Image.Image) -> NDArray[Any]:
    """Return the numbers of a grey image of 16 or 32 bits, [H, W]."""
    values = np.asarray(image)
    if image.mode != "I":
        return values
    tags = getattr(image, "tag_v2", {})
    kinds = tags.get(_TIFF_SAMPLE_FORMAT, (None,)) if tags else (None,)
    if tags and (kinds in (_UNSIGNED, None) or kinds[0] in (_UNSIGNED, None)):
        return values.view(np.uint32)  # Pillow has no mode for numbers above 2^31
    return values


def scale_to_bytes(values: NDArray[Any]) -> tuple[NDArray[np.uint8], str]:
    """Scale numbers to 0 … 255 by the rule of this module.

    Args:
        values: integers or floats of any shape; NaN and infinity become black.

    Returns:
        The numbers as uint8 in the same shape, and a description of the scaling.

    Raises:
        ValueError: there is no finite number.
    """
    is_float = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if is_float else values
    if finite.size == 0:
        raise ValueError("no number of the image is finite")
    low, high = finite.min(), finite.max()
    if is_float and low >= 0 and high <= 1:
        start, white = 0.0, 1.0
    elif not is_float and low >= 0 and high <= 65_535:
        start = 0.0
        white = float(2 ** next(depth for depth in _DEPTHS if high < 2**depth) - 1)
    else:
        start, white = float(low), float(high)
    scale = 255 / (white - start) if white > start else 0.0
    if is_float:
        values = np.nan_to_num(values, nan=start, posinf=start, neginf=start)
    is_long = not is_float and values.dtype.itemsize > 2  # more digits than a float32 has
    numbers: Any = values.astype(np.float64 if is_long else np.float32)
    scaled: NDArray[np.uint8] = np.floor((numbers - start) * scale + 0.5).astype(np.uint8)
    return scaled, f"{start:,.6g} … {white:,.6g} to 0 … 255"


def read_deep_colour(
    image: Image.Image, stream: IO[bytes], open_again: Callable[[IO[bytes]], Image.Image]
) -> NDArray[np.uint16] | None:
    """Decode a colour image of 16 bits a channel, of which Pillow decodes only the upper bytes.

    The image is decoded a second time with the two bytes of each number swapped, which gives the
    lower bytes.

    Args:
        image: opened image that is not decoded yet.
        stream: file of the image.
        open_again: opens the image in the stream.

    Returns:
        The numbers, uint16 [H, W, 3 or 4]; None: the image is not a 16-bit colour image.
    """
    tiles = getattr(image, "tile", [])
    names = {_packing(tile) for tile in tiles}
    if len(names) != 1 or image.mode not in ("RGB", "RGBA"):
        return None
    (name,) = names
    if not name.startswith(("RGB;16", "RGBA;16", "LA;16")):
        return None
    start = stream.tell()
    stream.seek(0)
    again: Any = open_again(stream)
    swapped = "RGBA" if name.startswith("LA") else name[:-4] + _LOW_BYTE[name[-4:]]
    again.tile = [_with_packing(tile, swapped) for tile in tiles]
    again.load()
    other = np.asarray(again).astype(np.uint16)
    if name.startswith("LA"):  # four bytes: grey, grey, alpha, alpha
        grey, alpha = other[..., 0] << 8 | other[..., 1], other[..., 2] << 8 | other[..., 3]
        stream.seek(start)
        return np.stack([grey, grey, grey, alpha], axis=-1)
    stream.seek(start)
    image.load()
    upper = np.asarray(image).astype(np.uint16)
    whole: NDArray[np.uint16] = np.left_shift(upper, 8) | other
    return whole


def _packing(tile: Any) -> str:
    arguments = tile[3]
    name = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
    return str(name)


def _with_packing(tile: Any, name: str) -> Any:
    arguments = name if isinstance(tile[3], str) else (name, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)
