"""List the image files for a prediction, without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.data.pictures import SUFFIXES
from edge_client.data.remarks import Remark, as_text, summarise
from edge_client.data.walk import find_pictures
from protocol.errors import NotFound


def image_files(paths: Sequence[Path]) -> tuple[list[Path], list[Remark]]:
    """List the image files among ``paths``, and those in the folders among them.

    A file is listed whatever its name. Of a folder, the list has the files that joining would read,
    sorted.

    Args:
        paths: files and folders.

    Returns:
        The files, and the skipped files and folders with the reasons; a path that does not exist
        is one of these.

    Raises:
        NotFound: there is no image file.
    """
    files: list[Path] = []
    skipped: list[Remark] = []
    for path in paths:
        if path.is_dir():
            found, left_out = find_pictures(path)
            files += found
            skipped += left_out
        elif path.exists() or path.is_symlink():
            files.append(path)
        else:
            skipped.append(Remark(as_text(path), "no such file or folder"))
    if not files:
        raise NotFound(
            "there is no image file",
            field="images",
            limit=sorted(SUFFIXES),
            value=[as_text(path) for path in paths],
            hint=f"Skipped: {summarise(skipped)}" if skipped else None,
        )
    return files, skipped
