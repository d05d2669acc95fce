"""Parse the text after ``--data`` and load the data set that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_client.data.errors import PartitionError, SourceError

if TYPE_CHECKING:  # they import torch or Pillow; a source is also parsed without images
    from edge_client.data.batches import Preprocessing
    from edge_client.data.dataset import Dataset
    from edge_client.data.pictures import Colour
    from edge_client.data.reading import Progress


Kind = Literal["folder", "torchvision", "digits", "fashion-mnist"]

FORMS = "folder:PATH | torchvision:NAME[:ROOT] | digits | fashion-mnist[:ROOT]"


@dataclass(frozen=True)
class DataSource:
    """A parsed ``--data`` text.

    Attributes:
        kind: kind of the source.
        name: name of the set or the folder.
        path: the folder or root in the text; None: the text has none.
    """

    kind: Kind
    name: str
    path: Path | None = None

    def __str__(self) -> str:
        """Return the text that `parse_source` parses to this source."""
        words: list[str] = [self.kind]
        if self.kind == "torchvision":
            words.append(self.name)
        if self.path is not None:
            words.append(str(self.path))
        return ":".join(words)


def parse_source(text: str) -> DataSource:
    """Parse ``folder:PATH``, ``torchvision:NAME[:ROOT]``, ``digits`` or ``fashion-mnist[:ROOT]``.

    Only the text is checked, not whether the set exists.

    Raises:
        SourceError: the text has another form.
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


def load_dataset(
    source: DataSource | str,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    background: Colour = (255, 255, 255),
    preprocessing: Preprocessing | None = None,
    cache_bytes: int = 0,
    progress: Progress = lambda done, total: None,
) -> Dataset:
    """Load a data set for training and testing; missing files are downloaded.

    The files of a folder are decoded once. With ``preprocessing``, resized images are kept within
    ``cache_bytes``, so that `BatchReader` does not decode them again.

    Args:
        source: the source, or its text.
        held_out: share of each class held out for testing, in (0, 1), if the set has no test
            images.
        seed: seed of the choice of held-out images.
        class_names: class names of the run, in the order of its labels; images of other classes
            are skipped.
        background: colour behind transparent parts, (R, G, B).
        preprocessing: preprocessing of the run's model; None: no resized images are kept.
        cache_bytes: memory budget of the resized images, in bytes.
        progress: called with the number of files read and of all files.

    Raises:
        DataError: see `edge_client.data.errors` for its kinds.
    """
    if not 0.0 < held_out < 1.0:
        raise PartitionError("held-out share", limit="more than 0, less than 1", value=held_out)
    source = parse_source(source) if isinstance(source, str) else source
    if source.kind == "folder":
        from edge_client.data.folder import load_folder

        dataset = load_folder(
            source.path or Path(source.name),
            held_out=held_out,
            seed=seed,
            class_names=class_names,
            background=background,
            preprocessing=preprocessing,
            cache_bytes=cache_bytes,
            progress=progress,
        )
    else:
        dataset = _load_set(source, held_out, seed, background)
    return dataset if class_names is None else dataset.aligned(class_names)


def _load_set(source: DataSource, held_out: float, seed: int, background: Colour) -> Dataset:
    """Load a set. Loaders are imported on use, because a device may lack a loader's library."""
    if source.kind == "digits":
        from edge_client.data.digits import load_digits

        return load_digits(held_out=held_out, seed=seed)
    if source.kind == "fashion-mnist":
        from edge_client.data.fashion_mnist import load_fashion_mnist

        return load_fashion_mnist(source.path)
    from edge_client.data.torchvision_set import load_torchvision

    return load_torchvision(
        source.name, source.path, held_out=held_out, seed=seed, background=background
    )
