"""Decode image files to pixels, and report why a file cannot be decoded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from edge_client.data.errors import CorruptImageError

MAX_PIXELS = 64_000_000  # 192 MB as RGB; checked by the header, before decoding

_CHECK_THREADS = 2


def rgb_tensor(image: Image.Image) -> Tensor:
    """Return an image's pixels, uint8 [3, H, W].

    Transparency is dropped; of 16-bit grey only the upper byte is used.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which PIL stores in 16 or 32 bits
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def decode_file(path: Path) -> Tensor:
    """Decode an image file to uint8 [3, H, W].

    Raises:
        CorruptImageError: the file cannot be decoded.
    """
    try:
        with _open(path) as image:
            return rgb_tensor(image)
    except Exception as error:  # decoders raise exceptions of many types
        raise CorruptImageError(
            "image", limit="a readable image", value=str(path), hint=_reason(error)
        ) from error


def check_files(paths: Sequence[Path]) -> list[str | None]:
    """Return for each file the reason why it cannot be decoded, or None."""
    # One filter for all threads: warning filters are per process, not per thread.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            return list(pool.map(_check_file, paths))


def _check_file(path: Path) -> str | None:
    try:
        with _open(path) as image:
            image.draft("RGB", (1, 1))  # JPEG: reads all bytes, decodes few pixels
            image.load()
    except Exception as error:  # as in decode_file
        return _reason(error)
    return None


def _open(path: Path) -> Image.Image:
    image = Image.open(path)
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, despite its name"
    return f"cannot be decoded: {error}"
