"""Find the picture files below folders, and give the reason for each skipped entry.

Links to folders are followed. A folder is read once: a loop of links, and a link to a folder that
is read elsewhere, are skipped. Hidden and machine-made entries are skipped.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from edge_client.data.pictures import OTHER_SUFFIXES, SUFFIXES
from edge_client.data.remarks import Remark, as_text

# Folders and files that operating systems and programs create. Hidden ones begin with a dot, such
# as `._x.jpg` of macOS and `.thumbnails` of Linux.
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

NOT_A_PICTURE = "the suffix is not that of an image file"

HIDDEN = "hidden or machine-made entries skipped"

_SILENT = frozenset({".ds_store", "desktop.ini", "thumbs.db"})


class PictureWalk:
    """Walks through folder trees.

    Args:
        root: the data folder, which contains all trees.

    Attributes:
        files: tree and path of each picture file.
        skipped: skipped files and folders, with the reasons.
    """

    def __init__(self, root: Path) -> None:
        self.files: list[tuple[str, Path]] = []
        self.skipped: list[Remark] = []
        self._root = os.path.realpath(root)
        self._seen: set[tuple[int, int]] = set()
        self._links: list[tuple[str, Path]] = []

    def list_folder(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the folders and the regular files in a folder, sorted; skip all other entries.

        A link to a folder counts as a folder.
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
        """Find the pictures below a folder; `follow_links` reads the links to folders later."""
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
        """Read the folders that links lead to; call it after all trees have been added."""
        while self._links:
            tree, link = self._links.pop(0)
            target = os.path.realpath(link)
            if _is_within(os.path.realpath(link.parent), target) or _is_within(self._root, target):
                self._skip(link, f"a loop of links: it leads back to {as_text(target)}")
            elif _identity(link) in self._seen:
                self._skip(link, f"a link to {as_text(target)}, which is already read")
            else:
                self.add_root(tree, link)

    def _read(self, tree: str, folder: Path) -> list[Path]:
        """Add the pictures in a folder; return the folders in it."""
        identity = _identity(folder)
        if identity in self._seen:
            self._skip(folder, "the folder is already read under another name")
            return []
        if identity is not None:
            self._seen.add(identity)
        folders, files = self.list_folder(folder)
        for file in files:
            suffix = file.suffix.lower()
            if suffix in SUFFIXES:
                self.files.append((tree, file))
            elif suffix in OTHER_SUFFIXES:
                self._skip(file, f"{suffix} is not supported: save it as JPEG or PNG")
            else:
                self._skip(file, NOT_A_PICTURE)
        return folders

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Remark(as_text(path), reason))


def find_pictures(folder: Path) -> tuple[list[Path], list[Remark]]:
    """List the picture files below a folder, sorted, and the skipped entries with the reasons."""
    walk = PictureWalk(folder)
    walk.add_root("", folder)
    walk.follow_links()
    return sorted(path for _, path in walk.files), walk.skipped


def is_machine_made(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or created by a system or a program."""
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
