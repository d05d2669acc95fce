"""The natural groups of images, such as all images of one writer, from a table or file names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edge_client.data.errors import DataFormatError, PartitionError
from edge_client.data.remarks import as_text, compose

GROUPS_FILE = "groups.csv"

SEPARATOR = "_"

_HINT = (
    f"Put {GROUPS_FILE} with the columns file,group into the data folder (file: the path relative "
    f"to it), or name every image GROUP{SEPARATOR}…, such as ann{SEPARATOR}01.png, or use another "
    "partition."
)


def file_groups(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the group of each image.

    The groups are those in root/groups.csv, if it exists. Otherwise the group is the part of the
    file name before its first ``_``.

    Args:
        root: the data folder.
        paths: paths of the images, below ``root``.

    Raises:
        PartitionError: an image has no group.
        DataFormatError: groups.csv is unreadable, or gives a file two groups.
    """
    table = root / GROUPS_FILE
    groups = _read_groups(table) if table.is_file() else None
    return tuple(_group(root, path, groups) for path in paths)


def no_groups_error(set_name: str) -> PartitionError:
    """Return the error for a set without groups."""
    field = f"groups of {set_name}"
    return PartitionError(field, limit="an id for each image", value=None, hint=_HINT)


def _group(root: Path, path: Path, groups: dict[str, str] | None) -> str:
    file = compose(as_text(path.relative_to(root).as_posix()))
    if groups is not None:
        group = groups.get(file, "")
        if not group:
            raise PartitionError(
                "group of an image", limit=f"a row in {root / GROUPS_FILE}", value=file, hint=_HINT
            )
        return group
    group, separator, _ = path.name.partition(SEPARATOR)
    if not (group and separator):
        raise PartitionError(
            "group of an image", limit=f"a name GROUP{SEPARATOR}…", value=file, hint=_HINT
        )
    return group


def _read_groups(table: Path) -> dict[str, str]:
    """Read groups.csv: the group of each file."""
    groups: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream, strict=True)
            if not {"file", "group"} <= set(rows.fieldnames or ()):
                raise DataFormatError(
                    f"columns of {table}",
                    limit="file,group",
                    value=",".join(rows.fieldnames or ()),
                )
            for row in rows:
                file, group = ((row[name] or "").strip() for name in ("file", "group"))
                file = compose(PurePosixPath(file).as_posix())  # ./cat/1.png is cat/1.png
                if groups.setdefault(file, group) != group:
                    raise DataFormatError(
                        f"groups of {file} in {table}",
                        limit=groups[file],
                        value=group,
                        hint="Give each file one group.",
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(
            str(table), limit="CSV in UTF-8", value="unreadable", hint=str(error)
        ) from error
    return groups
