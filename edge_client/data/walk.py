"""Find the picture files below folders, and name whatever is not read.

Links to folders are followed. A folder is read once: a loop of links, or a link to a folder that is
read elsewhere, is named and left out. Hidden entries and machine-made copies are left out.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from edge_client.data.pictures import OTHER_SUFFIXES, SUFFIXES
from edge_client.data.remarks import Skipped, as_text

# Folders and files that systems and programs make beside people's pictures. Hidden ones, such as
# `._x.jpg` of macOS and `.thumbnails` of Linux, begin with a dot.
_MACHINE_MADE = frozenset(
    {
        "$recycle.bin",
        "#recycle",
        "@eadir",
        "@recycle",
        "__macosx",
        "lost+found",
        "system volume information",
    }
)

NOT_A_PICTURE = "not named like an image file"

HIDDEN = "hidden or machine-made entries left out"

_SILENT = frozenset({".ds_store", "desktop.ini", "thumbs.db"})


class PictureWalk:
    """Walks through folder trees.

    Args:
        root: the data folder, below which all trees lie.

    Attributes:
        files: tree and path of each picture file that was found.
        skipped: what is left out, and why.
    """

    def __init__(self, root: Path) -> None:
        self.files: list[tuple[str, Path]] = []
        self.skipped: list[Skipped] = []
        self._root = os.path.realpath(root)
        self._seen: set[tuple[int, int]] = set()
        self._links: list[tuple[str, Path]] = []

    def list_folder(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the folders and the other files in a folder, sorted; name what has to be left out.

        Links to folders are among the folders.
        """
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            self._skip(folder, f"the folder cannot be listed: {error.strerror}")
            return [], []
        folders: list[Path] = []
        files: list[Path] = []
        hidden: list[str] = []
        for entry in entries:
            if is_machine_made(entry.name):
                hidden += [entry.name] if entry.name.lower() not in _SILENT else []
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                self._skip(entry, _stat_problem(entry, error))
                continue
            if stat.S_ISDIR(mode):
                folders.append(entry)
            elif stat.S_ISREG(mode):
                files.append(entry)
            else:
                self._skip(entry, "not a regular file")
        if hidden:
            named = ", ".join(map(as_text, hidden[:3])) + (", …" if len(hidden) > 3 else "")
            self._skip(folder, f"{len(hidden)} {HIDDEN}: {named}")
        return folders, files

    def add_tree(self, tree: str, folder: Path) -> None:
        """Find the pictures below a folder; links are noted for `follow_links`."""
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            if current.is_symlink():
                self._links.append((tree, current))
            else:
                waiting += self._read(tree, current)

    def add_root(self, tree: str, folder: Path) -> None:
        """Find the pictures in and below a folder that may itself be a link."""
        for inside in self._read(tree, folder):
            self.add_tree(tree, inside)

    def follow_links(self) -> None:
        """Read the folders that links lead to, after all folders that lie in the trees."""
        while self._links:
            tree, link = self._links.pop(0)
            target = os.path.realpath(link)
            if _is_within(os.path.realpath(link.parent), target) or _is_within(self._root, target):
                self._skip(link, f"a loop of links: it leads back to {as_text(target)}")
            elif _identity(link) in self._seen:
                self._skip(link, f"a link to {as_text(target)}, which is read already")
            else:
                self.add_root(tree, link)

    def _read(self, tree: str, folder: Path) -> list[Path]:
        """Take the pictures in a folder; return the folders in it."""
        identity = _identity(folder)
        if identity in self._seen:
            self._skip(folder, "a folder that is read already under another name")
            return []
        if identity is not None:
            self._seen.add(identity)
        folders, files = self.list_folder(folder)
        for file in files:
            suffix = file.suffix.lower()
            if suffix in SUFFIXES:
                self.files.append((tree, file))
            elif suffix in OTHER_SUFFIXES:
                self._skip(file, f"{suffix} is not read: save it as JPEG or PNG")
            else:
                self._skip(file, NOT_A_PICTURE)
        return folders

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(as_text(path), reason))


def find_pictures(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """List the picture files below a folder, sorted, and what is left out."""
    walk = PictureWalk(folder)
    walk.add_root("", folder)
    walk.follow_links()
    return sorted(path for _, path in walk.files), walk.skipped


def is_machine_made(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a system and not by people."""
    return name.startswith(".") or name.lower() in _MACHINE_MADE | _SILENT


def _stat_problem(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a loop of links"
    if error.errno == errno.ENOENT and path.is_symlink():
        return "a link to nothing"
    return f"cannot be read: {error.strerror}"


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None  # listing it reports the error
    return status.st_dev, status.st_ino


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
