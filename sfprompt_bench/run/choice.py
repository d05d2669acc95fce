"""The settings of a run, by its data: a preset, or a folder of one's own images."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from edge_client.data.layout import list_files
from protocol.errors import InvalidField, NotFound
from protocol.federation import FederationSettings
from protocol.messages import parse_message
from protocol.presets import Form, over_form
from protocol.settings import RunSettings
from sfprompt_bench.presets import PRESETS, Preset, preset_named, with_changes

_SMALL_SIDE = 80  # pixels; below it, more would be made up by enlarging

_SIZE_OF_SMALL, _SIZE = 56, 112  # pixels; the time of a run grows with their square

_MEASURED = 100  # files, at most

_ROUNDS = 8

_MIN_CLASSES = 2


def choose_preset(data: str, form: Form, image_size: int | None) -> Preset:
    """Return the preset of a data set, or the one made for a folder of images.

    Args:
        data: name of a preset, ``folder:PATH``, or the path of a folder.
        form: form of SFPrompt.
        image_size: side of the model's input, in pixels; None: the preset's.

    Raises:
        NotFound: this names neither.
        InvalidField: the folder has fewer than two class folders with images.
    """
    if data in PRESETS:
        preset = preset_named(data, form)
        if image_size is None:
            return preset
        settings = with_changes(preset.settings, {"model": {"image_size": image_size}})
        return replace(preset, settings=settings)
    kind, colon, path = data.partition(":")
    root = Path(path if colon else data).expanduser()
    if (kind == "folder" and path) or root.is_dir():
        return folder_preset(root, form, image_size)
    raise NotFound(
        "this names no data set for a run",
        field="data",
        limit=[*PRESETS, "folder:PATH"],
        value=data,
        hint="your own images: --data folder:PATH, with one folder for each class",
    )


def folder_preset(root: Path, form: Form, image_size: int | None = None) -> Preset:
    """Make the settings of a run on a folder with one folder of images per class.

    Args:
        root: the folder, laid out as for ``edge-client join --data folder:…``.
        form: form of SFPrompt.
        image_size: side of the model's input, in pixels; None: chosen by the images' size.

    Raises:
        MissingDataError: ``root`` is not a folder.
        InvalidField: it has fewer than two class folders with images.
    """
    listed = list_files(root, None, "data")
    files = [*listed.train.files, *(listed.test.files if listed.test else ())]
    names = sorted({name for name, _ in files})
    if len(names) < _MIN_CLASSES:
        raise InvalidField(
            "a run needs images of two classes",
            field="data",
            limit="a folder with one folder of images per class",
            value=names,
            hint=f"edge-client check {root} lists what it reads",
        )
    values: dict[str, Any] = {
        "name": root.resolve().name,
        "class_names": names,
        "model": {
            "image_size": image_size or _choose_size([path for _, path in files]),
            "num_classes": len(names),
        },
        "federation": FederationSettings(rounds=_ROUNDS).model_dump(),
    }
    settings = parse_message(RunSettings, over_form(form, values))
    return Preset(data=f"folder:{root}", settings=settings)


def _choose_size(files: Sequence[Path]) -> int:
    """Choose the model's input by the median of the images' shorter sides."""
    step = max(1, len(files) // _MEASURED)
    sides = []
    for path in itertools.islice(files, 0, None, step):
        try:
            with Image.open(path) as picture:  # reads the header alone
                sides.append(min(picture.size))
        except OSError:  # the devices name unreadable files
            continue
    is_small = bool(sides) and statistics.median(sides) < _SMALL_SIDE
    return _SIZE_OF_SMALL if is_small else _SIZE
