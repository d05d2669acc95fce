"""The text after `--data`: which set, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_client.data.errors import SourceError

Kind = Literal["folder", "torchvision", "digits", "fashion-mnist"]

FORMS = "folder:PATH | torchvision:NAME[:ROOT] | digits | fashion-mnist[:ROOT]"


@dataclass(frozen=True)
class DataSource:
    """One parsed `--data` text. path is the folder or root given, None where none was."""

    kind: Kind
    name: str
    path: Path | None = None

    def __str__(self) -> str:
        """The text that parses to this source."""
        words: list[str] = [self.kind]
        if self.kind == "torchvision":
            words.append(self.name)
        if self.path is not None:
            words.append(str(self.path))
        return ":".join(words)


def parse_source(text: str) -> DataSource:
    """Read `folder:PATH`, `torchvision:NAME[:ROOT]`, `digits` or `fashion-mnist[:ROOT]`.

    Only the shape of the text is checked; whether the set exists is for `load_dataset`.
    Raises SourceError.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind == "folder" and rest:
        path = Path(rest).expanduser()
        return DataSource("folder", path.name or str(path), path)
    if kind == "torchvision":
        name, _, root = rest.partition(":")
        if name:
            return DataSource("torchvision", name, Path(root).expanduser() if root else None)
    if kind == "digits" and not colon:
        return DataSource("digits", "digits")
    if kind == "fashion-mnist" and (rest or not colon):
        return DataSource("fashion-mnist", kind, Path(rest).expanduser() if rest else None)
    raise SourceError("--data", limit=FORMS, value=text)
