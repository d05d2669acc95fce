"""Generated picture files of each format and mode, with the pixels that people see in them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.picture_bytes import (
    adobe_rgb,
    adobe_rgb_in_srgb,
    ink_lab,
    png,
    png_chunk,
    print_profile,
    tiff,
)

Numbers = NDArray[Any]

EXACT, LOSSY, CONVERTED = 0, 12, 4  # largest difference of a channel

_WIDTH, _HEIGHT = 24, 16


@dataclass(frozen=True)
class Case:
    """A file, and what reading it yields on a white background.

    Attributes:
        stored: what the file holds, for people.
        suffix: of its name.
        expected: RGB, uint8 [H, W, 3]; None: it cannot be read.
        tolerance: largest difference of a channel.
    """

    format: str
    stored: str
    suffix: str
    data: bytes
    expected: Numbers | None
    tolerance: int = EXACT


def _quarters(*values: Any) -> Numbers:
    """Fill an image's quarters, from the left upper one on; they differ in size."""
    numbers = np.array(values)
    image = np.empty((_HEIGHT, _WIDTH, *numbers.shape[1:]), numbers.dtype)
    image[:8, :8], image[:8, 8:], image[8:, :8], image[8:, 8:] = numbers
    return image


COLOURS = _quarters((200, 40, 30), (30, 180, 60), (40, 60, 210), (230, 220, 90)).astype(np.uint8)

GREYS = _quarters(0, 90, 170, 255).astype(np.uint8)

ALPHA = _quarters(255, 0, 128, 255).astype(np.uint8)


def _rgb(grey: Numbers) -> Numbers:
    return np.repeat(grey[..., None], 3, axis=-1)


def _on_white(pixels: Numbers, alpha: Numbers = ALPHA) -> Numbers:
    share = alpha[..., None] / 255
    return (pixels * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def _scaled(values: Numbers, black: float, white: float) -> Numbers:
    return _rgb(((values - black) / (white - black) * 255 + 0.5).astype(np.uint8))


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _image(pixels: Numbers) -> Image.Image:
    return Image.fromarray(pixels)


def _with_alpha(pixels: Numbers) -> Image.Image:
    image = _image(pixels)
    image.putalpha(_image(ALPHA))
    return image


def _oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def _seen(pixels: Numbers, orientation: int) -> Numbers:
    """Turn stored pixels as EXIF 2.32, table 6 says: which side row 0 and column 0 are."""
    across, down = pixels[:, ::-1], pixels[::-1]
    turned = {
        1: pixels,
        2: across,
        3: down[:, ::-1],
        4: down,
        5: pixels.swapaxes(0, 1),
        6: down.swapaxes(0, 1),
        7: down[:, ::-1].swapaxes(0, 1),
        8: across.swapaxes(0, 1),
    }
    return turned[orientation]


def all_cases() -> list[Case]:
    """Return all cases, by format."""
    return [*_png(), *_jpeg(), *_tiff(), *_others(), *_unread()]


def _png() -> Iterator[Case]:
    def case(stored: str, data: bytes, expected: Numbers, tolerance: int = EXACT) -> Case:
        return Case("PNG", stored, ".png", data, expected, tolerance)

    colours, greys = _image(COLOURS), _image(GREYS)
    bits = GREYS > 100
    yield case("1 bit", _save(_image(bits), "PNG"), _rgb(bits * np.uint8(255)))
    yield case("2-bit grey", png(GREYS // 85, 0, depth=2), _rgb(GREYS // 85 * 85))
    yield case("4-bit grey", png(GREYS // 17, 0, depth=4), _rgb(GREYS // 17 * 17))
    key = png_chunk(b"tRNS", b"\0\x0a")
    nibbles = GREYS // 17
    shown = np.where(nibbles == 10, 255, nibbles * 17).astype(np.uint8)
    yield case("4-bit grey, a transparent grey", png(nibbles, 0, depth=4, chunks=key), _rgb(shown))
    yield case("8-bit grey", _save(greys, "PNG"), _rgb(GREYS))
    shown = np.where(GREYS == 90, 255, GREYS)
    yield case("8-bit grey, a transparent grey", _save(greys, "PNG", transparency=90), _rgb(shown))
    yield case("grey and alpha", _save(_with_alpha(GREYS), "PNG"), _on_white(_rgb(GREYS)))
    palette = colours.quantize(4)
    yield case("palette", _save(palette, "PNG"), COLOURS)
    index = int(np.asarray(palette)[0, 0])
    shown = COLOURS.copy()
    shown[:8, :8] = 255
    yield case("palette, a transparent entry", _save(palette, "PNG", transparency=index), shown)
    alphas = bytearray([255] * 4)
    alphas[index] = 128
    shown = COLOURS.copy()
    shown[:8, :8] = _on_white(COLOURS, np.full_like(ALPHA, 128))[:8, :8]
    data = _save(palette, "PNG", transparency=bytes(alphas))
    yield case("palette, half-transparent entries", data, shown)
    yield case("RGB", _save(colours, "PNG"), COLOURS)
    shown = COLOURS.copy()
    shown[:8, :8] = 255
    data = _save(colours, "PNG", transparency=(200, 40, 30))
    yield case("RGB, a transparent colour", data, shown)
    yield case("RGBA", _save(_with_alpha(COLOURS), "PNG"), _on_white(COLOURS))
    drawing = np.zeros((_HEIGHT, _WIDTH, 4), np.uint8)
    drawing[..., 3] = ALPHA
    data = _save(_image(drawing), "PNG")
    yield case("RGBA, a black drawing", data, _on_white(_rgb(np.zeros_like(GREYS))))
    full = GREYS.astype(np.uint16) * 257
    yield case("16-bit grey", png(full, 0), _rgb(GREYS))
    deep = _quarters(0, 1000, 2000, 4095)
    yield case("16-bit grey, 12-bit data", png(deep, 0), _scaled(deep, 0, 4095))
    key = png_chunk(b"tRNS", (1000).to_bytes(2, "big"))
    shown = _scaled(deep, 0, 4095)
    shown[:8, 8:] = 255
    yield case("16-bit grey, a transparent grey", png(deep, 0, chunks=key), shown)
    both = np.stack([full, ALPHA.astype(np.uint16) * 257], axis=-1)
    yield case("16-bit grey and alpha", png(both, 4), _on_white(_rgb(GREYS)))
    yield case("16-bit RGB", png(COLOURS.astype(np.uint16) * 257, 2), COLOURS)
    twelve = COLOURS.astype(np.uint16) * 16
    expected = ((twelve / 4095) * 255 + 0.5).astype(np.uint8)
    yield case("16-bit RGB, 12-bit data", png(twelve, 2), expected)
    both = np.concatenate([COLOURS, ALPHA[..., None]], axis=-1).astype(np.uint16) * 257
    yield case("16-bit RGBA", png(both, 6), _on_white(COLOURS))
    data = _save(colours, "PNG", exif=_oriented(6))
    yield case("EXIF orientation 6", data, _seen(COLOURS, 6))
    data = _save(colours, "PNG", icc_profile=adobe_rgb())
    yield case("RGB, a wide-gamut profile", data, adobe_rgb_in_srgb(COLOURS), CONVERTED)
    data = _save(_with_alpha(COLOURS), "PNG", icc_profile=adobe_rgb())
    expected = _on_white(adobe_rgb_in_srgb(COLOURS))
    yield case("RGBA, a wide-gamut profile", data, expected, CONVERTED)
    data = _save(colours, "PNG", icc_profile=b"no profile")
    yield case("RGB, a damaged profile", data, COLOURS)
    frames = [_image(COLOURS[:, ::-1].copy())]
    data = _save(colours, "PNG", save_all=True, append_images=frames)
    yield case("animated", data, COLOURS)


def _jpeg() -> Iterator[Case]:
    options: dict[str, Any] = {"quality": 95, "subsampling": 0}

    def case(stored: str, image: Image.Image, expected: Numbers, **more: Any) -> Case:
        data = _save(image, "JPEG", **options, **more)
        return Case("JPEG", stored, ".jpg", data, expected, LOSSY)

    colours, greys = _image(COLOURS), _image(GREYS)
    yield case("grey", greys, _rgb(GREYS))
    yield case("YCbCr", colours, COLOURS)
    yield case("progressive", colours, COLOURS, progressive=True)
    for number in range(2, 9):
        stored = f"EXIF orientation {number}"
        yield case(stored, colours, _seen(COLOURS, number), exif=_oriented(number))
    yield case("damaged EXIF", colours, COLOURS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    wide = adobe_rgb_in_srgb(COLOURS)
    yield case("a wide-gamut profile", colours, wide, icc_profile=adobe_rgb())
    corners = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)]
    inks = (_quarters(*corners) * 255).astype(np.uint8)
    ink = Image.frombytes("CMYK", (_WIDTH, _HEIGHT), inks.tobytes())
    plain = _quarters((255, 255, 255), (0, 255, 255), (255, 0, 0), (0, 0, 0))
    yield case("CMYK as Adobe writes it, inverted", ink, plain)
    printed = _quarters(*(_lab_in_srgb(ink_lab(corner)) for corner in corners))
    yield case("CMYK, a press profile", ink, printed, icc_profile=print_profile())
    frames = [_image(COLOURS[:, ::-1].copy())]
    data = _save(colours, "MPO", **options, save_all=True, append_images=frames)
    yield Case("JPEG", "several pictures (MPO)", ".mpo", data, COLOURS, LOSSY)


def _lab_in_srgb(lab: tuple[int, int, int]) -> tuple[int, int, int]:
    """Convert CIE Lab (D50) to sRGB by the written-out formulas."""
    f_y = (lab[0] + 16) / 116
    cubes = [f_y + lab[1] / 500, f_y, f_y - lab[2] / 200]
    ratios = [f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29) for f in cubes]
    x, y, z = np.array(ratios) * (0.9642, 1.0, 0.8249)
    linear = (
        3.1338561 * x - 1.6168667 * y - 0.4906146 * z,
        -0.9787684 * x + 1.9161415 * y + 0.0334540 * z,
        0.0719453 * x - 0.2289914 * y + 1.4052427 * z,
    )
    clipped = [min(max(value, 0.0), 1.0) for value in linear]
    curved = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in clipped]
    red, green, blue = (round(255 * value) for value in curved)
    return red, green, blue


def _tiff() -> Iterator[Case]:
    def case(stored: str, data: bytes, expected: Numbers, tolerance: int = EXACT) -> Case:
        return Case("TIFF", stored, ".tif", data, expected, tolerance)

    colours, greys = _image(COLOURS), _image(GREYS)
    bits = GREYS > 100
    yield case("1 bit", _save(_image(bits), "TIFF"), _rgb(bits * np.uint8(255)))
    yield case("8-bit grey", _save(greys, "TIFF"), _rgb(GREYS))
    yield case("8-bit grey, white is zero", tiff(GREYS, photometric=0), _rgb(255 - GREYS))
    yield case("grey and alpha", _save(_with_alpha(GREYS), "TIFF"), _on_white(_rgb(GREYS)))
    yield case("palette", _save(colours.quantize(4), "TIFF"), COLOURS)
    yield case("RGB", _save(colours, "TIFF"), COLOURS)
    yield case("RGBA", _save(_with_alpha(COLOURS), "TIFF"), _on_white(COLOURS))
    both = np.concatenate([COLOURS, ALPHA[..., None]], axis=-1)
    dimmed = both.copy()
    dimmed[..., :3] = (COLOURS * (ALPHA[..., None] / 255)).astype(np.uint8)
    data = tiff(dimmed, photometric=2, extra=(1,))
    yield case("RGBA, premultiplied", data, _on_white(COLOURS), CONVERTED)
    inks = np.concatenate([255 - COLOURS, np.zeros_like(ALPHA)[..., None]], axis=-1)
    ink = Image.frombytes("CMYK", (_WIDTH, _HEIGHT), inks.tobytes())
    yield case("CMYK", _save(ink, "TIFF"), COLOURS)
    white = Image.new("LAB", (_WIDTH, _HEIGHT), (255, 128, 128))
    yield case("LAB", _save(white, "TIFF"), np.full_like(COLOURS, 255), CONVERTED)
    full = GREYS.astype(np.uint16) * 257
    yield case("16-bit grey", _save(_image(full), "TIFF"), _rgb(GREYS))
    yield case("16-bit grey, white is zero", tiff(full, photometric=0), _rgb(255 - GREYS))
    deep = _quarters(0, 1000, 2000, 4095).astype(np.uint16)
    data = _save(_image(deep), "TIFF", compression="tiff_lzw")
    yield case("16-bit grey, 12-bit data", data, _scaled(deep, 0, 4095))
    signed = _quarters(-300, 0, 300, 1000).astype(np.int16)
    yield case("16-bit grey with a sign", tiff(signed, photometric=1), _scaled(signed, -300, 1000))
    yield case("16-bit RGB", tiff(COLOURS.astype(np.uint16) * 257, photometric=2), COLOURS)
    twelve = COLOURS.astype(np.uint16) * 16
    expected = ((twelve / 4095) * 255 + 0.5).astype(np.uint8)
    yield case("16-bit RGB, 12-bit data", tiff(twelve, photometric=2), expected)
    data = tiff(twelve, photometric=2, compress=True)
    yield case("16-bit RGB, 12-bit data, compressed", data, expected)
    data = tiff(both.astype(np.uint16) * 257, photometric=2, extra=(2,))
    yield case("16-bit RGBA", data, _on_white(COLOURS))
    large = _quarters(0, 70_000, 2_000_000_000, 4_000_000_000).astype(np.uint32)
    expected = _scaled(large.astype(np.float64), 0, 4e9)
    yield case("32-bit grey above 65,535", tiff(large, photometric=1), expected)
    ints = _quarters(-5, 0, 60_000, 100_000).astype(np.int32)
    expected = _scaled(ints, -5, 100_000)
    yield case("32-bit grey with a sign", tiff(ints, photometric=1), expected)
    shares = _quarters(0.0, 0.25, 0.5, 1.0).astype(np.float32)
    yield case("float, 0 to 1", tiff(shares, photometric=1), _scaled(shares, 0, 1))
    degrees = _quarters(-4.0, 10.0, 21.0, 36.0).astype(np.float32)
    yield case("float, another range", tiff(degrees, photometric=1), _scaled(degrees, -4, 36))
    holes = _quarters(np.nan, 0.25, np.inf, 1.0).astype(np.float32)
    expected = _scaled(np.where(np.isfinite(holes), holes, 0), 0, 1)
    yield case("float with NaN and infinity", tiff(holes, photometric=1), expected)
    exif = _oriented(8)
    yield case("EXIF orientation 8", _save(colours, "TIFF", exif=exif), _seen(COLOURS, 8))
    data = _save(colours, "TIFF", save_all=True, append_images=[greys])
    yield case("several pages", data, COLOURS)


def _others() -> Iterator[Case]:
    colours, greys = _image(COLOURS), _image(GREYS)
    bits, both = _image(GREYS > 100), _with_alpha(COLOURS)
    palette = colours.quantize(4)
    index = int(np.asarray(palette)[0, 0])
    cut = COLOURS.copy()
    cut[:8, :8] = 255
    mirrored = _image(COLOURS[:, ::-1].copy())
    black_white = _rgb((GREYS > 100) * np.uint8(255))
    yield Case("GIF", "palette", ".gif", _save(palette, "GIF"), COLOURS)
    data = _save(palette, "GIF", transparency=index)
    yield Case("GIF", "palette, a transparent entry", ".gif", data, cut)
    data = _save(palette, "GIF", save_all=True, append_images=[mirrored.quantize(4)])
    yield Case("GIF", "animated", ".gif", data, COLOURS)
    yield Case("BMP", "1 bit", ".bmp", _save(bits, "BMP"), black_white)
    yield Case("BMP", "8-bit grey", ".bmp", _save(greys, "BMP"), _rgb(GREYS))
    yield Case("BMP", "palette", ".bmp", _save(palette, "BMP"), COLOURS)
    yield Case("BMP", "RGB", ".bmp", _save(colours, "BMP"), COLOURS)
    # The format does not say what the fourth byte means.
    yield Case("BMP", "RGB in 32 bits", ".bmp", _save(both, "BMP"), COLOURS)
    lossless: dict[str, Any] = {"lossless": True, "exact": True}
    data = _save(colours, "WEBP", **lossless)
    yield Case("WEBP", "RGB", ".webp", data, COLOURS)
    data = _save(both, "WEBP", **lossless)
    yield Case("WEBP", "RGBA", ".webp", data, _on_white(COLOURS))
    data = _save(colours, "WEBP", **lossless, exif=_oriented(6))
    yield Case("WEBP", "EXIF orientation 6", ".webp", data, _seen(COLOURS, 6))
    data = _save(colours, "WEBP", **lossless, save_all=True, append_images=[mirrored])
    yield Case("WEBP", "animated", ".webp", data, COLOURS)
    best: dict[str, Any] = {"quality": 100, "subsampling": "4:4:4"}
    yield Case("AVIF", "RGB", ".avif", _save(colours, "AVIF", **best), COLOURS, LOSSY)
    yield Case("AVIF", "RGBA", ".avif", _save(both, "AVIF", **best), _on_white(COLOURS), LOSSY)
    data = _save(colours, "AVIF", **best, exif=_oriented(6))
    yield Case("AVIF", "orientation 6", ".avif", data, _seen(COLOURS, 6), LOSSY)
    yield Case("JPEG2000", "8-bit grey", ".jp2", _save(greys, "JPEG2000"), _rgb(GREYS))
    yield Case("JPEG2000", "RGB", ".jp2", _save(colours, "JPEG2000"), COLOURS)
    yield Case("JPEG2000", "RGBA", ".jp2", _save(both, "JPEG2000"), _on_white(COLOURS))
    yield Case("PPM", "1 bit", ".pbm", _save(bits, "PPM"), black_white)
    yield Case("PPM", "8-bit grey", ".pgm", _save(greys, "PPM"), _rgb(GREYS))
    yield Case("PPM", "RGB", ".ppm", _save(colours, "PPM"), COLOURS)
    head, deep = f"P5 {_WIDTH} {_HEIGHT}".encode(), _quarters(0, 1000, 2000, 4095)
    data = head + b" 4095\n" + deep.astype(">u2").tobytes()
    yield Case("PPM", "grey up to 4,095", ".pgm", data, _scaled(deep, 0, 4095), 1)
    shares = _quarters(0.0, 0.25, 0.5, 1.0).astype("<f4")
    data = f"Pf\n{_WIDTH} {_HEIGHT}\n-1.0\n".encode() + shares[::-1].tobytes()
    yield Case("PPM", "float, 0 to 1 (PFM)", ".pfm", data, _scaled(shares, 0, 1))


def _unread() -> Iterator[Case]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = _save(_image(noise), "JPEG")[:-500]
    huge = png(np.zeros((1, 1), np.uint8), 0, depth=8)
    claims = huge[:16] + (20_000).to_bytes(4, "big") * 2 + huge[24:29]
    claims += png_chunk(b"IHDR", huge[12:16] and claims[16:29])[-4:] + huge[33:]
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield Case("-", "text", ".png", b"no picture", None)
    yield Case("-", "EPS, which would run a program", ".png", script, None)
    yield Case("JPEG", "cut off", ".jpg", cut, None)
    yield Case("PNG", "20,000 x 20,000 pixels", ".png", claims, None)
    empty = tiff(np.full((4, 4), np.nan, np.float32), photometric=1)
    yield Case("TIFF", "float, all NaN", ".tif", empty, None)
