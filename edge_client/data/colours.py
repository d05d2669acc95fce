"""Convert the colours of images to sRGB with the ICC profile in the file."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from edge_client.data.remarks import as_text

_MODES = {
    "RGB": "RGB",
    "GRAY": "L",
    "CMYK": "CMYK",
    "Lab": "LAB",
}  # ICC colour space: Pillow's mode

_SAME = 2  # on a scale of 0 to 255: a profile that changes colours by at most this is sRGB


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """Convert an image of 8 bits a channel to RGB in sRGB.

    Args:
        image: image without transparency.
        profile: ICC profile in the file; None: the file has none.

    Returns:
        The RGB image, and a description of the conversion; None: the colours did not change.
    """
    if not profile:
        return _plain(image)
    try:
        name, mode = _describe(profile)
        if mode == "RGB" and image.mode != "CMYK":
            image = image.convert("RGB")
        elif mode == "L" and image.mode == "1":
            image = image.convert("L")
        if mode != image.mode:
            raise ValueError(f"it is for {mode}, the image is {image.mode}")
        transform = _transform(profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError) as error:
        plain, change = _plain(image)
        ignored = f"the colour profile is ignored: {as_text(str(error)).strip()}"
        return plain, f"{change}; {ignored}" if change else ignored
    if transform is None:
        return image.convert("RGB"), None
    converted = transform.apply(image)
    return converted, f"{mode} to sRGB by the profile in the file ({name})"


def _plain(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Convert without a profile."""
    if image.mode == "RGB":
        return image, None
    change = None
    if image.mode == "CMYK":
        change = "CMYK to RGB without a profile: (255 - C)(255 - K) / 255"
    elif image.mode == "LAB":
        change = "LAB to sRGB"
    return image.convert("RGB"), change


@lru_cache(maxsize=32)
def _describe(profile: bytes) -> tuple[str, str]:
    """Return a profile's description and Pillow's mode of its colour space."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = str(opened.profile.xcolor_space).strip()
    if space not in _MODES:
        raise ValueError(f"it is for {space or 'an unknown space'}")
    name = as_text(str(opened.profile.profile_description or "without a name").strip())
    return name[:80], _MODES[space]


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the conversion to sRGB; None: it would change no colour visibly."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    probe = _probe(mode)
    if probe is None:
        return transform
    before = np.asarray(probe.convert("RGB")).astype(int)
    after = np.asarray(transform.apply(probe)).astype(int)
    return None if int(np.abs(after - before).max()) <= _SAME else transform


def _probe(mode: str) -> Image.Image | None:
    """Return an image with colours of the whole space; None: the space is not RGB or grey."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode == "RGB":
        steps = np.linspace(0, 255, 6).astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        return Image.fromarray(colours)
    return None
