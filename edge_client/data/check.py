"""Check a data folder: count the images that joining would use, and report problems."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_client.data.layout import list_files
from edge_client.data.pictures import NEARLY_ONE_VALUE, WHITE, Colour, Picture
from edge_client.data.reading import ParallelReader, Progress, Unreadable
from edge_client.data.remarks import Remark, as_text, class_name
from edge_client.data.sampling import stratified_share
from edge_client.data.similar import MAX_PICTURES, describe_picture, find_similar
from edge_client.data.walk import HIDDEN, NOT_A_PICTURE

Kind = Literal[
    "unreadable",
    "skipped",
    "machine-made",
    "unknown class",
    "missing class",
    "leak",
    "conflict",
    "duplicate",
    "near duplicate",
    "one value",
    "odd size",
    "not searched",
]

_NOTES = frozenset({"near duplicate", "odd size", "not searched"})  # not problems

_MIN_SIDE, _MAX_ASPECT, _MAX_AREA_RATIO = 16, 4.0, 16.0

_COPIES = re.compile(r"(^|[._ -])(thumb|thumbnail|preview)s?([._ -]|$)|-\d{2,4}x\d{2,4}$", re.I)


@dataclass(frozen=True)
class Finding:
    """A finding about a file, a pair of files or a class.

    Attributes:
        kind: kind of the finding.
        is_problem: whether it can reduce the accuracy or stop the training.
        path: the file, folder or class.
        reason: explanation.
    """

    kind: Kind
    is_problem: bool
    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The images that joining would use, and the findings about them.

    Attributes:
        folder: path of the data folder.
        layout: "test folder" or "held-out share".
        classes: number of images of each class, in "train" and "test".
        sizes: number of images of each size, the most frequent size first.
        converted: number of images to which each kind of conversion was applied.
        findings: all findings.
    """

    folder: str
    layout: str
    classes: dict[str, dict[str, int]]
    sizes: dict[str, int]
    converted: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    @property
    def has_problems(self) -> bool:
        return any(finding.is_problem for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _CheckedImage:
    path: Path
    name: str
    split: str
    digest: bytes
    dhash: NDArray[np.uint64]
    thumbnail: NDArray[np.uint8]
    size: tuple[int, int]
    spread: int
    steps: tuple[str, ...]

    def label(self) -> str:
        return f"{as_text(self.path)} ({self.split})"


def check_folder(
    root: Path,
    *,
    class_names: Sequence[str] | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    background: Colour = WHITE,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Read a folder as joining does, and report its images and problems.

    Args:
        root: the data folder.
        class_names: class names of the run; None: they are not known.
        held_out: share of each class held out for testing, if there is no test folder.
        seed: seed of the choice of held-out images.
        background: colour behind transparent parts, (R, G, B).
        progress: called with the number of files read and of all files.

    Raises:
        MissingDataError: ``root`` is not a folder.
        PartitionError: ``held_out`` is out of range.
    """
    listed = list_files(root, class_names, "folder")
    train, test = listed.train, listed.test
    files = [(name, path, "train") for name, path in train.files]
    files += [] if test is None else [(name, path, "test") for name, path in test.files]
    images, failed = _read(files, background, progress)
    if test is None:
        images = _hold_out(images, held_out, seed)
    findings = [Finding("unreadable", True, as_text(path), why) for path, why in failed.items()]
    findings += [_describe_skipped(entry) for entry in dict.fromkeys(listed.skipped)]
    folders = {*train.folders.values(), *(() if test is None else test.folders.values())}
    used = images
    if class_names is not None:
        known = {class_name(name) for name in class_names}
        findings += _check_classes(known, folders, images)
        used = [each for each in images if each.name in known]
    findings += [*_check_names(used), *_check_pixels(used), *_find_duplicates(used)]
    names = folders if class_names is None else {class_name(name) for name in class_names}
    counts = {name: {"train": 0, "test": 0} for name in sorted(names)}
    for each in used:
        counts[each.name][each.split] += 1
    sizes = Counter(f"{width} x {height}" for width, height in (each.size for each in used))
    steps = Counter(step for each in used for step in each.steps)
    kind = "held-out share" if test is None else "test folder"
    return Report(as_text(root), kind, counts, dict(sizes.most_common()), dict(steps), findings)


def _read(
    files: Sequence[tuple[str, Path, str]], background: Colour, progress: Progress
) -> tuple[list[_CheckedImage], dict[Path, str]]:
    """Decode every file once.

    Returns:
        The readable images, and the reason for each unreadable file.
    """
    labels = {path: (name, split) for name, path, split in files}

    def process(path: Path, picture: Picture) -> _CheckedImage:
        dhash, thumbnail = describe_picture(picture.pixels)
        height, width = picture.pixels.shape[:2]
        data = b"%d %d " % (width, height) + picture.pixels.tobytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        steps = tuple(step.kind for step in picture.steps)
        name, split = labels[path]
        return _CheckedImage(
            path, name, split, digest, dhash, thumbnail, (width, height), picture.spread, steps
        )

    images: list[_CheckedImage] = []
    failed: dict[Path, str] = {}
    paths = [path for _, path, _ in files]
    for path, result in ParallelReader(paths, background, process, progress):
        if isinstance(result, Unreadable):
            failed[path] = result.reason
        else:
            images.append(result)
    return images, failed


def _hold_out(images: list[_CheckedImage], share: float, seed: int) -> list[_CheckedImage]:
    """Hold out the images that joining would hold out."""
    names = sorted({each.name for each in images})
    labels = np.array([names.index(each.name) for each in images], np.int64)
    chosen = set(stratified_share(labels, share, seed).tolist())
    return [
        _CheckedImage(**{**vars(each), "split": "test"}) if position in chosen else each
        for position, each in enumerate(images)
    ]


def _describe_skipped(entry: Remark) -> Finding:
    hidden = HIDDEN in entry.reason
    is_problem = not hidden and entry.reason != NOT_A_PICTURE
    return Finding("machine-made" if hidden else "skipped", is_problem, entry.path, entry.reason)


def _check_classes(
    known: set[str], folders: set[str], images: Sequence[_CheckedImage]
) -> Iterator[Finding]:
    counts = Counter(each.name for each in images)
    for name in sorted(folders - known):
        reason = f"not a class of the run ({counts[name]} images)"
        yield Finding("unknown class", True, name, reason)
    trained = {each.name for each in images if each.split == "train"}
    for name in sorted(known - trained):
        yield Finding("missing class", True, name, "the folder has no training image of this class")


def _check_names(images: Sequence[_CheckedImage]) -> Iterator[Finding]:
    for each in images:
        if _COPIES.search(each.path.stem) or _COPIES.search(each.path.parent.name):
            reason = "the name is that of a copy made by a program; the image is used"
            yield Finding("machine-made", True, as_text(each.path), reason)


def _check_pixels(images: Sequence[_CheckedImage]) -> Iterator[Finding]:
    areas = [width * height for width, height in (each.size for each in images)]
    median = float(np.median(areas)) if areas else 0.0
    for each, area in zip(images, areas, strict=True):
        path = as_text(each.path)
        if each.spread < NEARLY_ONE_VALUE:
            yield Finding("one value", True, path, f"almost one value (range {each.spread})")
        size = f"{each.size[0]} x {each.size[1]}"
        short, long = sorted(each.size)
        if short < _MIN_SIDE:
            yield Finding(
                "odd size", False, path, f"{size}: one side is shorter than {_MIN_SIDE} pixels"
            )
        elif long > _MAX_ASPECT * short:
            yield Finding("odd size", False, path, f"{size}: cropping removes most of the image")
        elif not median / _MAX_AREA_RATIO <= area <= median * _MAX_AREA_RATIO:
            yield Finding("odd size", False, path, f"{size}: differs much from the median size")


def _find_duplicates(images: Sequence[_CheckedImage]) -> Iterator[Finding]:
    """Find equal and similar images; images of almost one value are not compared."""
    varied = [each for each in images if each.spread >= NEARLY_ONE_VALUE]
    same: dict[bytes, list[_CheckedImage]] = defaultdict(list)
    for each in varied:
        same[each.digest].append(each)
    for group in same.values():
        yield from (_describe_pair(group[0], other, exact=True) for other in group[1:])
    distinct = [group[0] for group in same.values()]
    if len(distinct) > MAX_PICTURES:
        reason = f"near duplicates are searched among at most {MAX_PICTURES:,} images"
        yield Finding("not searched", False, f"{len(distinct):,} images", reason)
        return
    if not distinct:
        return
    hashes = np.stack([each.dhash for each in distinct])
    thumbnails = np.stack([each.thumbnail for each in distinct])
    for first, second in find_similar(hashes, thumbnails):
        yield _describe_pair(distinct[first], distinct[second], exact=False)


def _describe_pair(one: _CheckedImage, other: _CheckedImage, *, exact: bool) -> Finding:
    relation = "the same pixels as" if exact else "looks like"
    reason = f"{relation} {other.label()}"
    kind: Kind = "duplicate" if exact else "near duplicate"
    if one.name != other.name and exact:
        kind, reason = "conflict", f"{reason}: classes {one.name} and {other.name}"
    elif one.split != other.split:
        kind, reason = "leak", f"{reason}: in training and in test"
    return Finding(kind, kind not in _NOTES, one.label(), reason)
