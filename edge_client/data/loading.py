"""From a parsed `--data` text to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.data.dataset import Dataset
from edge_client.data.errors import PartitionError
from edge_client.data.source import DataSource, parse_source


def load_dataset(
    source: DataSource | str,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Open a data set for training and testing; files that are not there are fetched.

    held_out: the share of each class to test on, in (0, 1), where the set has no test half of its
    own; chosen by seed. class_names: the run's classes in the order of its labels; images of
    others are left out and named.
    Raises DataError; see edge_client.data.errors for its kinds.
    """
    if not 0.0 < held_out < 1.0:
        raise PartitionError("held-out share", limit="more than 0, less than 1", value=held_out)
    wanted = parse_source(source) if isinstance(source, str) else source
    dataset = _load(wanted, held_out, seed)
    return dataset if class_names is None else dataset.aligned(class_names)


def _load(source: DataSource, held_out: float, seed: int) -> Dataset:
    """Each kind's module is imported when it is asked for: a device may lack its library."""
    if source.kind == "digits":
        from edge_client.data.digits import load_digits

        return load_digits(held_out=held_out, seed=seed)
    if source.kind == "fashion-mnist":
        from edge_client.data.fashion_mnist import load_fashion_mnist

        return load_fashion_mnist(source.path)
    if source.kind == "folder":
        from edge_client.data.folder import load_folder

        return load_folder(source.path or Path(source.name), held_out=held_out, seed=seed)
    from edge_client.data.torchvision_set import load_torchvision

    return load_torchvision(source.name, source.path, held_out=held_out, seed=seed)
