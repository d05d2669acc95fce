"""Read every picture of a device once, before it joins: hashes, oddities, resized pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edge_client.data.batches import Preprocessing
from edge_client.data.image_set import Decoded, digest_of, tensor_of
from edge_client.data.pictures import NEARLY_ONE_VALUE, Colour, Picture, Step
from edge_client.data.reading import Failed, Progress, Reading
from edge_client.data.remarks import Skipped, as_text

_PHRASES = {
    "frame": "taken from their first frame",
    "turned": "turned upright (EXIF)",
    "range": "scaled to 8 bits",
    "colour": "converted in their colours",
    "background": "laid on the background",
}


@dataclass(frozen=True)
class FirstRead:
    """What one decoding of all pictures yields.

    Attributes:
        failed: the reason for each file that cannot be read.
        noticed: odd pictures, and how many were converted in which way.
        decoded: hashes and resized pixels, for the images' store.
    """

    failed: dict[Path, str]
    noticed: tuple[Skipped, ...]
    decoded: Decoded


@dataclass(frozen=True)
class _Look:
    digest: bytes
    resized: Tensor | None
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
        paths: of the files.
        background: colour behind transparent parts.
        preprocessing: of the run's model; None: no resized images are kept.
        cache_bytes: memory budget of the resized images.
        progress: receives the count.
    """
    count = 0 if preprocessing is None else cache_bytes // preprocessing.bytes_per_image
    kept = frozenset(paths[:count])

    def look(path: Path, picture: Picture) -> _Look:
        image = tensor_of(picture)
        resized = None
        if preprocessing is not None and path in kept:
            resized = preprocessing.resize(image.unsqueeze(0))[0].clone()
        return _Look(digest_of(image), resized, picture.spread, picture.steps)

    failed: dict[Path, str] = {}
    noticed: list[Skipped] = []
    converted: Counter[str] = Counter()
    digests: dict[Path, bytes] = {}
    images: dict[Path, Tensor] = {}
    for path, result in Reading(paths, background, look, progress):
        if isinstance(result, Failed):
            failed[path] = result.reason
            continue
        digests[path] = result.digest
        if result.resized is not None:
            images[path] = result.resized
        if result.spread < NEARLY_ONE_VALUE:
            noticed.append(Skipped(as_text(path), f"almost one value (range {result.spread})"))
        converted.update(step.kind for step in result.steps)
    noticed += [
        Skipped(f"{converted[kind]} image{'s' * (converted[kind] > 1)}", phrase)
        for kind, phrase in _PHRASES.items()
        if converted[kind]
    ]
    form = None if preprocessing is None else preprocessing.form
    return FirstRead(failed, tuple(noticed), Decoded(digests, form, images))
