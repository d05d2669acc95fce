"""The settings of a run, by the name of its data: a preset, or a folder of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from protocol.errors import NotFound
from protocol.presets import Form
from sfprompt_bench.presets import PRESETS, Preset, preset_named, with_changes


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
        from sfprompt_bench.run.own_images import folder_preset  # imports Pillow

        return folder_preset(root, form, image_size)
    raise NotFound(
        "this names no data set for a run",
        field="data",
        limit=[*PRESETS, "folder:PATH"],
        value=data,
        hint="your own images: --data folder:PATH, with one folder for each class",
    )
