"""Report what joining would train on with a folder, and what may be wrong with it."""

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
from edge_client.data.reading import Failed, Progress, Reading
from edge_client.data.remarks import Skipped, as_text, class_name
from edge_client.data.sampling import stratified_share
from edge_client.data.similar import MAX_PICTURES, look_of, near_pairs
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

_NOTES = frozenset({"near duplicate", "odd size", "not searched"})  # no problem by themselves

_SMALL_SIDE, _LONG_RATIO, _FAR_AREA = 16, 4.0, 16.0

_COPIES = re.compile(r"(^|[._ -])(thumb|thumbnail|preview)s?([._ -]|$)|-\d{2,4}x\d{2,4}$", re.I)


@dataclass(frozen=True)
class Finding:
    """One thing about a file, a pair of files, or a class.

    Attributes:
        is_problem: whether the accuracy or the training suffers from it.
    """

    kind: Kind
    is_problem: bool
    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What joining with a folder would train on.

    Attributes:
        layout: "test folder" or "held-out share".
        classes: number of images by class and split.
        sizes: number of images by size, the most frequent first.
        converted: number of images by what was done to them.
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
class _Seen:
    path: Path
    name: str
    split: str
    digest: bytes
    hash: NDArray[np.uint64]
    copy: NDArray[np.uint8]
    size: tuple[int, int]
    spread: int
    steps: tuple[str, ...]

    def named(self) -> str:
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
    """Read a folder as joining does, and report.

    Args:
        root: the data folder.
        class_names: of the run, if they are known.
        held_out: share to test on, if there is no test folder.
        seed: determines the held-out images.
        background: colour behind transparent parts.
        progress: receives the count of files read.

    Raises:
        MissingDataError: ``root`` is not a folder.
        PartitionError: ``held_out`` is out of range.
    """
    listed = list_files(root, class_names, "folder")
    train, test = listed.train, listed.test
    files = [(name, path, "train") for name, path in train.files]
    files += [] if test is None else [(name, path, "test") for name, path in test.files]
    seen, failed = _read(files, background, progress)
    if test is None:
        seen = _hold_out(seen, held_out, seed)
    findings = [Finding("unreadable", True, as_text(path), why) for path, why in failed.items()]
    findings += [_of_skipped(entry) for entry in dict.fromkeys(listed.skipped)]
    folders = {*train.folders.values(), *(() if test is None else test.folders.values())}
    used = seen
    if class_names is not None:
        known = {class_name(name) for name in class_names}
        findings += _of_classes(known, folders, seen)
        used = [each for each in seen if each.name in known]
    findings += [*_of_names(used), *_of_pixels(used), *_of_likeness(used)]
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
) -> tuple[list[_Seen], dict[Path, str]]:
    """Decode every file once; return what is kept of each, and why others cannot be read."""
    labels = {path: (name, split) for name, path, split in files}

    def look(path: Path, picture: Picture) -> _Seen:
        bits, copy = look_of(picture.pixels)
        height, width = picture.pixels.shape[:2]
        data = b"%d %d " % (width, height) + picture.pixels.tobytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        steps = tuple(step.kind for step in picture.steps)
        name, split = labels[path]
        return _Seen(path, name, split, digest, bits, copy, (width, height), picture.spread, steps)

    seen: list[_Seen] = []
    failed: dict[Path, str] = {}
    paths = [path for _, path, _ in files]
    for path, result in Reading(paths, background, look, progress):
        if isinstance(result, Failed):
            failed[path] = result.reason
        else:
            seen.append(result)
    return seen, failed


def _hold_out(seen: list[_Seen], share: float, seed: int) -> list[_Seen]:
    """Hold out the images that joining would hold out."""
    names = sorted({each.name for each in seen})
    labels = np.array([names.index(each.name) for each in seen], np.int64)
    chosen = set(stratified_share(labels, share, seed).tolist())
    return [
        _Seen(**{**vars(each), "split": "test"}) if position in chosen else each
        for position, each in enumerate(seen)
    ]


def _of_skipped(entry: Skipped) -> Finding:
    hidden = HIDDEN in entry.reason
    is_problem = not hidden and entry.reason != NOT_A_PICTURE
    return Finding("machine-made" if hidden else "skipped", is_problem, entry.path, entry.reason)


def _of_classes(known: set[str], folders: set[str], seen: Sequence[_Seen]) -> Iterator[Finding]:
    counts = Counter(each.name for each in seen)
    for name in sorted(folders - known):
        reason = f"not a class of the run ({counts[name]} images)"
        yield Finding("unknown class", True, name, reason)
    trained = {each.name for each in seen if each.split == "train"}
    for name in sorted(known - trained):
        yield Finding("missing class", True, name, "no training image here of this class")


def _of_names(seen: Sequence[_Seen]) -> Iterator[Finding]:
    for each in seen:
        if _COPIES.search(each.path.stem) or _COPIES.search(each.path.parent.name):
            reason = "named like a copy that a program has made, and read"
            yield Finding("machine-made", True, as_text(each.path), reason)


def _of_pixels(seen: Sequence[_Seen]) -> Iterator[Finding]:
    areas = [width * height for width, height in (each.size for each in seen)]
    usual = float(np.median(areas)) if areas else 0.0
    for each, area in zip(seen, areas, strict=True):
        path = as_text(each.path)
        if each.spread < NEARLY_ONE_VALUE:
            yield Finding("one value", True, path, f"almost one value (range {each.spread})")
        size = f"{each.size[0]} x {each.size[1]}"
        short, long = sorted(each.size)
        if short < _SMALL_SIDE:
            yield Finding("odd size", False, path, f"{size}: a side below {_SMALL_SIDE}")
        elif long > _LONG_RATIO * short:
            yield Finding("odd size", False, path, f"{size}: cropping leaves little of it")
        elif not usual / _FAR_AREA <= area <= usual * _FAR_AREA:
            yield Finding("odd size", False, path, f"{size}: far from the usual size")


def _of_likeness(seen: Sequence[_Seen]) -> Iterator[Finding]:
    """Compare all pictures; those of one value are equal to many others, and left out."""
    varied = [each for each in seen if each.spread >= NEARLY_ONE_VALUE]
    same: dict[bytes, list[_Seen]] = defaultdict(list)
    for each in varied:
        same[each.digest].append(each)
    for group in same.values():
        yield from (_of_pair(group[0], other, exact=True) for other in group[1:])
    distinct = [group[0] for group in same.values()]
    if len(distinct) > MAX_PICTURES:
        reason = f"near duplicates are not searched among more than {MAX_PICTURES:,} images"
        yield Finding("not searched", False, f"{len(distinct):,} images", reason)
        return
    if not distinct:
        return
    hashes = np.stack([each.hash for each in distinct])
    copies = np.stack([each.copy for each in distinct])
    for first, second in near_pairs(hashes, copies):
        yield _of_pair(distinct[first], distinct[second], exact=False)


def _of_pair(one: _Seen, other: _Seen, *, exact: bool) -> Finding:
    likeness = "the same pixels as" if exact else "looks like"
    reason = f"{likeness} {other.named()}"
    kind: Kind = "duplicate" if exact else "near duplicate"
    if one.name != other.name and exact:
        kind, reason = "conflict", f"{reason}: classes {one.name} and {other.name}"
    elif one.split != other.split:
        kind, reason = "leak", f"{reason}: in training and in test"
    return Finding(kind, kind not in _NOTES, one.named(), reason)
