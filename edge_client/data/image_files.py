"""List image files for a prediction; reads none of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from protocol.errors import NotFound


def image_files(paths: Iterable[Path]) -> list[Path]:
    """List the image files among ``paths`` and, sorted, below the folders among them.

    Raises:
        NotFound: a path does not exist, or there is no image file.
    """
    suffixes = set(Image.registered_extensions())
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise NotFound("no such file or folder", field="images", value=str(path))
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes)
        else:
            files.append(path)
    if not files:
        raise NotFound("there is no image file", field="images", limit=sorted(suffixes)[:12])
    return files
