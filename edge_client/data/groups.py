"""The natural group that an image belongs to, such as all images of one writer or camera."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edge_client.data.errors import DataFormatError, PartitionError

FILE = "groups.csv"
SEPARATOR = "_"
HOW = (
    f"Put {FILE} with the columns file,group into the data folder (file: the path from there), or "
    f"name every image GROUP{SEPARATOR}…, such as ann{SEPARATOR}01.png; data without ids take "
    "another partition."
)


def file_groups(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """The group of every image below root, in the order of paths.

    From root/groups.csv, if it is there, and else the part of each file's name before its first
    `_`. Raises PartitionError if an image has no group, DataFormatError if groups.csv is none.
    """
    table = root / FILE
    known = _read(table) if table.is_file() else None
    return tuple(_group(root, path, known) for path in paths)


def no_groups(what: str) -> PartitionError:
    """The error for a set whose images belong to nobody that is known."""
    return PartitionError(f"groups of {what}", limit="an id for each image", value=None, hint=HOW)


def _group(root: Path, path: Path, known: dict[str, str] | None) -> str:
    place = path.relative_to(root).as_posix()
    if known is not None:
        group = known.get(place, "")
        if not group:
            raise PartitionError(
                "group of an image", limit=f"a row in {root / FILE}", value=place, hint=HOW
            )
        return group
    group, separator, _ = path.name.partition(SEPARATOR)
    if not (group and separator):
        raise PartitionError(
            "group of an image", limit=f"a name GROUP{SEPARATOR}…", value=place, hint=HOW
        )
    return group


def _read(table: Path) -> dict[str, str]:
    """Group by file, as groups.csv has them."""
    groups: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            if not {"file", "group"} <= set(rows.fieldnames or ()):
                raise DataFormatError(
                    f"columns of {table}",
                    limit="file,group",
                    value=",".join(rows.fieldnames or ()),
                )
            for row in rows:
                place, group = ((row[name] or "").strip() for name in ("file", "group"))
                place = PurePosixPath(place).as_posix()  # ./cat/1.png is cat/1.png
                if groups.setdefault(place, group) != group:
                    raise DataFormatError(
                        f"groups of {place} in {table}",
                        limit=groups[place],
                        value=group,
                        hint="A file is in one group.",
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(
            str(table), limit="CSV in UTF-8", value="unreadable", hint=str(error)
        ) from error
    return groups
