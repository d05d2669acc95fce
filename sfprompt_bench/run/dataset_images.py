"""Turn the images of a data set in memory into pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from protocol.errors import InvalidField

_CHANNELS = (1, 3)

_GREY_DIMENSIONS, _COLOUR_DIMENSIONS = 2, 3


def as_picture(image: Any, position: int) -> Image.Image:
    """Return an image as a picture, without loss for 8-bit images.

    Args:
        image: a PIL image, or an array or tensor: uint8, or floats from 0 to 1; [H, W], [C, H, W]
            or [H, W, C] with 1 or 3 channels.
        position: in the data set, for an error.

    Raises:
        InvalidField: the image is of another kind, shape or range.
    """
    if isinstance(image, Image.Image):
        return image
    try:
        pixels = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise _refuse("an image or an array of pixels", type(image).__name__, position) from error
    return Image.fromarray(_as_bytes(_channels_last(pixels, position), position))


def _channels_last(pixels: NDArray[Any], position: int) -> NDArray[Any]:
    if pixels.ndim == _COLOUR_DIMENSIONS:
        if pixels.shape[2] not in _CHANNELS and pixels.shape[0] in _CHANNELS:
            pixels = pixels.transpose(1, 2, 0)  # [C, H, W] -> [H, W, C]
        if pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]  # [H, W]
    is_grey = pixels.ndim == _GREY_DIMENSIONS
    is_colour = pixels.ndim == _COLOUR_DIMENSIONS and pixels.shape[2] in _CHANNELS
    if pixels.size == 0 or not (is_grey or is_colour):
        limit = "[H, W], [C, H, W] or [H, W, C] with 1 or 3 channels"
        raise _refuse(limit, str(list(pixels.shape)), position)
    return pixels


def _as_bytes(pixels: NDArray[Any], position: int) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise _refuse("uint8, or floats from 0 to 1", str(pixels.dtype), position)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # NaN is refused, too
        limit = "floats from 0 to 1: give images before normalisation"
        raise _refuse(limit, low if low < 0 else high, position)
    return np.ascontiguousarray(np.rint(pixels * 255).astype(np.uint8))


def _refuse(limit: str, value: object, position: int) -> InvalidField:
    return InvalidField(
        f"the image at position {position} cannot be read",
        field="data",
        limit=limit,
        value=str(value),
    )
