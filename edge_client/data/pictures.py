"""Decode picture files to RGB pixels, as an image viewer shows them.

Joining, training, evaluation, prediction and benchmarks all read pictures with this module. It
turns a picture upright, composites transparent parts on a background, scales other ranges to 8
bits, and converts colours to sRGB. docs/pictures.md lists the conversions of each format.
"""

from __future__ import annotations

import re
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edge_client.data.colours import to_srgb
from edge_client.data.errors import CorruptImageError, TooManyPixelsError
from edge_client.data.ranges import is_wide, read_deep_colour, scale_to_bytes, wide_values
from edge_client.data.remarks import as_text

Pixels = NDArray[np.uint8]

Colour = tuple[int, int, int]

StepKind = Literal["frame", "turned", "range", "colour", "background"]

WHITE: Colour = (255, 255, 255)

MAX_PIXELS = 64_000_000  # 192 MB as RGB; the header is checked before decoding

NEARLY_ONE_VALUE = 4  # on a scale of 0 to 255: pictures with a smaller range are reported

# Pillow's names of the supported formats, and their file suffixes. Pillow's other plugins never get
# a file, because some of them run programs, such as the one for EPS.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "JPEG2000": (".j2k", ".jp2", ".jpx"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# Suffixes of unsupported formats: a remark asks people to convert such a file.
# fmt: off
OTHER_SUFFIXES = frozenset({
    ".ai", ".arw", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".ico", ".jxl", ".nef", ".orf",
    ".pdf", ".psd", ".raw", ".rw2", ".svg", ".tga", ".wmf",
})
# fmt: on

_ORIENTATION = 0x0112

_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0


@dataclass(frozen=True)
class Step:
    """One conversion of a picture, with a description for people."""

    kind: StepKind
    detail: str

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        pixels: upright RGB pixels, uint8 [H, W, 3].
        mode: Pillow's mode of the stored pixels, such as "RGBA".
        steps: the conversions, in order.
    """

    pixels: Pixels
    mode: str
    steps: tuple[Step, ...]

    @property
    def spread(self) -> int:
        """The difference of the largest and the smallest value of a channel, 0 to 255, at most."""
        channels = (self.pixels[..., number] for number in range(3))
        return max(int(channel.max()) - int(channel.min()) for channel in channels)


def read_picture(path: Path, background: Colour = WHITE) -> Picture:
    """Decode a picture file.

    Args:
        path: path of a regular file.
        background: colour behind transparent parts, (R, G, B).

    Raises:
        TooManyPixelsError: the header declares more than `MAX_PIXELS`.
        CorruptImageError: the file cannot be decoded.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise ValueError("not a regular file")
        with _quiet, path.open("rb") as stream:
            image = _open(stream)
            return _to_picture(image, background, stream)
    except TooManyPixelsError as error:
        error.value = as_text(path)
        raise
    except Exception as error:  # decoders raise exceptions of many types
        raise CorruptImageError(
            "image", limit="a readable image", value=as_text(path), hint=_reason(error)
        ) from error


def convert_picture(image: Image.Image, background: Colour = WHITE) -> Picture:
    """Convert an image that another library has opened.

    Raises:
        Exception: any of Pillow's errors.
    """
    with _quiet:
        return _to_picture(image, background, None)


@contextmanager
def known_formats_only() -> Iterator[None]:
    """Keep Pillow from trying other formats than ours, for code that opens files by itself.

    Some of its plugins run a program: such a file is refused as none that Pillow knows.
    """
    Image.init()
    all_formats = Image.ID
    Image.ID = [name for name in all_formats if name in FORMATS]
    try:
        yield
    finally:
        Image.ID = all_formats


def parse_colour(text: str) -> Colour:
    """Parse ``#rrggbb``.

    Raises:
        ValueError: the text has another form.
    """
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(f"a colour is #RRGGBB, not {text!r}")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _open(stream: IO[bytes]) -> Image.Image:
    Image.init()
    try:
        image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(
            "pixels of an image", limit=MAX_PIXELS, value=None, hint=str(error)
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        hint = f"{width} x {height} pixels, more than {MAX_PIXELS:,}"
        raise TooManyPixelsError("pixels of an image", limit=MAX_PIXELS, value=None, hint=hint)
    return image


def _to_picture(image: Image.Image, background: Colour, stream: IO[bytes] | None) -> Picture:
    steps: list[Step] = []
    mode, tile, stored_turn = image.mode, _tile(image), _tiff_tag(image, _ORIENTATION)
    low = None if stream is None else read_deep_colour(image, stream, _open)
    image.load()
    if getattr(image, "is_animated", False):
        steps.append(Step("frame", "only the first frame is used"))
    turn = _orientation(image)
    base, alpha = _split(image, tile, low, steps)
    converted, change = to_srgb(base, image.info.get("icc_profile"))
    if change:
        steps.append(Step("colour", change))
    pixels: Pixels = np.asarray(converted)  # [H, W, 3]
    if alpha is not None and int(alpha.min()) < 255:
        pixels = _composite(pixels, alpha, background)
        steps.append(
            Step("background", "transparent parts on #{:02x}{:02x}{:02x}".format(*background))
        )
    pixels = _turn(pixels, turn)
    if turn == 1 and stored_turn is not None and 2 <= stored_turn <= 8:
        turn = stored_turn  # Pillow has turned this TIFF while decoding it
    if turn != 1:
        steps.insert(0, Step("turned", f"turned upright (EXIF orientation {turn})"))
    return Picture(np.ascontiguousarray(pixels), mode, tuple(steps))


def _split(
    image: Image.Image, tile: str, low: NDArray[np.uint16] | None, steps: list[Step]
) -> tuple[Image.Image, Pixels | None]:
    """Split a picture into an opaque image of 8 bits and alpha, uint8 [H, W] or None."""
    if low is not None or is_wide(image):
        return _split_wide(image, low, steps)
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    key = image.info.get("transparency")
    if isinstance(key, int) and tile in ("L;2", "L;4"):  # Pillow scales the pixels, not the key
        image.info["transparency"] = key * (85 if tile == "L;2" else 17)
    palette_alpha = image.palette is not None and image.palette.mode.endswith("A")
    if key is None and image.mode not in ("LA", "PA", "RGBA") and not palette_alpha:
        return image, None
    opaque = image.mode if image.mode in ("1", "L", "CMYK") else "RGB"
    shown = image.convert("RGBA")
    base = shown.convert("RGB") if opaque == "RGB" and image.mode != "LA" else None
    if base is None:
        base = image.getchannel("L") if image.mode == "LA" else image
    return base, np.asarray(shown.getchannel("A"))


def _split_wide(
    image: Image.Image, low: NDArray[np.uint16] | None, steps: list[Step]
) -> tuple[Image.Image, Pixels | None]:
    """Scale a picture of more than 8 bits a channel to 8 bits, and split it like `_split`."""
    values = wide_values(image) if low is None else low
    alpha: Pixels | None = None
    key = image.info.get("transparency")
    if key is not None and not isinstance(key, bytes):
        matches = values == np.asarray(key)
        matches = matches.all(axis=-1) if matches.ndim == 3 else matches
        alpha = np.where(matches, 0, 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[-1] == 4:
        alpha, _ = scale_to_bytes(values[..., 3])
        values = values[..., :3]
    scaled, change = scale_to_bytes(values)
    if _tiff_tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    steps.append(Step("range", change))
    return Image.fromarray(scaled), alpha


def _composite(pixels: Pixels, alpha: Pixels, background: Colour) -> Pixels:
    weight = alpha[..., None].astype(np.uint16)  # [H, W, 1]
    behind = np.array(background, np.uint16)
    mixed: Pixels = ((pixels * weight + behind * (255 - weight) + 127) // 255).astype(np.uint8)
    return mixed


def _tile(image: Image.Image) -> str:
    """Return Pillow's name of the packing of the stored pixels; known only before decoding."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return arguments if isinstance(arguments, str) else ""


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value if isinstance(value, int) else None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the tag is missing or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # parsers of damaged tags raise exceptions of many types
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the content is not an image of a supported format"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be decoded: {as_text(str(error))}"


class _Quiet:
    """Silences Pillow's warnings while any thread decodes: filters are per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)


_quiet = _Quiet()
