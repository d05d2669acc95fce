"""Decode every picture of a device once before it joins: hashes, remarks, resized images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_client.data.batches import Preprocessing
from edge_client.data.image_set import Decoded, Pixels, channels_first, digest_of
from edge_client.data.pictures import NEARLY_ONE_VALUE, Colour, Picture, Step
from edge_client.data.reading import ParallelReader, Progress, Unreadable
from edge_client.data.remarks import Remark, as_text

_PHRASES = {
    "frame": "only the first frame is used",
    "turned": "turned upright (EXIF)",
    "range": "scaled to 8 bits",
    "colour": "colours converted to sRGB",
    "background": "transparent parts filled with the background colour",
}


@dataclass(frozen=True)
class FirstRead:
    """The result of decoding all pictures once.

    Attributes:
        failed: reason for each unreadable file.
        noticed: remarks on unusual pictures, and the number of pictures of each conversion.
        decoded: hashes and resized images, for a `FileStore`.
    """

    failed: dict[Path, str]
    noticed: tuple[Remark, ...]
    decoded: Decoded


@dataclass(frozen=True)
class _ReadImage:
    digest: bytes
    resized: Pixels | None
    spread: int
    steps: tuple[Step, ...]


def read_once(
    paths: Sequence[Path],
    background: Colour,
    preprocessing: Preprocessing | None,
    cache_bytes: int,
    progress: Progress,
) -> FirstRead:
    """Decode every file once.

    Args:
        paths: paths of the files.
        background: colour behind transparent parts, (R, G, B).
        preprocessing: preprocessing of the run's model; None: no images are resized.
        cache_bytes: memory budget of the resized images, in bytes.
        progress: called with the number of pictures read and of all pictures.
    """
    count = 0 if preprocessing is None else cache_bytes // preprocessing.bytes_per_image
    cached = frozenset(paths[:count])

    def process(path: Path, picture: Picture) -> _ReadImage:
        image = channels_first(picture)
        resized = None
        if preprocessing is not None and path in cached:
            resized = preprocessing.resize(image)
        return _ReadImage(digest_of(image), resized, picture.spread, picture.steps)

    failed: dict[Path, str] = {}
    noticed: list[Remark] = []
    converted: Counter[str] = Counter()
    digests: dict[Path, bytes] = {}
    images: dict[Path, Pixels] = {}
    for path, result in ParallelReader(paths, background, process, progress):
        if isinstance(result, Unreadable):
            failed[path] = result.reason
            continue
        digests[path] = result.digest
        if result.resized is not None:
            images[path] = result.resized
        if result.spread < NEARLY_ONE_VALUE:
            noticed.append(Remark(as_text(path), f"almost one value (range {result.spread})"))
        converted.update(step.kind for step in result.steps)
    noticed += [
        Remark(f"{converted[kind]} image{'s' * (converted[kind] > 1)}", phrase)
        for kind, phrase in _PHRASES.items()
        if converted[kind]
    ]
    form = None if preprocessing is None else preprocessing.form
    return FirstRead(failed, tuple(noticed), Decoded(digests, form, images))
