"""What a device that shares its labels sends, and what the server computes of it, in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol.messages import SAMPLE_ID_BYTES
from split_server.storage.tensor_files import read_tensors, write_named_tensors


class SamplesGone(Exception):
    """The server lacks samples or labels that it needs: a device has to send them again.

    Attributes:
        participant: whose.
    """

    def __init__(self, participant: str) -> None:
        super().__init__(participant)
        self.participant = participant


@dataclass(frozen=True)
class LabelledSamples:
    """Samples of the sample store, and their labels.

    Attributes:
        ids: of the samples; equal images have equal ids.
        labels: int64 [n].
    """

    ids: list[bytes]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], kind: str) -> LabelledSamples:
        """Return the samples of one kind from the tensors of a file."""
        data = tensors[f"{kind}_ids"].numpy().tobytes()
        ids = [data[at : at + SAMPLE_ID_BYTES] for at in range(0, len(data), SAMPLE_ID_BYTES)]
        return cls(ids, tensors[f"{kind}_labels"])

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors that `of` reads."""
        ids = torch.frombuffer(bytearray(b"".join(self.ids)) or bytearray(1), dtype=torch.uint8)
        rows = ids[: len(self) * SAMPLE_ID_BYTES].reshape(len(self), SAMPLE_ID_BYTES)
        return {f"{kind}_ids": rows.clone(), f"{kind}_labels": self.labels}


@dataclass(frozen=True)
class SharedLabels:
    """The samples of one participant, with their labels."""

    train: LabelledSamples
    test: LabelledSamples

    def is_equal(self, other: SharedLabels) -> bool:
        """Whether both name the same samples with the same labels."""
        return all(
            mine.ids == its.ids and torch.equal(mine.labels, its.labels)
            for mine, its in ((self.train, other.train), (self.test, other.test))
        )


def write_labels(path: Path, labels: SharedLabels) -> None:
    """Write a participant's samples and labels; they are durable on return."""
    write_named_tensors(path, labels.train.tensors("train") | labels.test.tensors("test"))


def read_labels(path: Path) -> SharedLabels | None:
    """Read what `write_labels` wrote; None: there is no such file.

    Raises:
        DamagedFile: it is not what was written.
    """
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    return SharedLabels(LabelledSamples.of(tensors, "train"), LabelledSamples.of(tensors, "test"))


@dataclass(frozen=True)
class Measured:
    """What the server has computed for a participant, and a device would remember.

    Attributes:
        decay: penalty of the classifier's steps, from round 0.
        held_out: features of the test samples, [m, r].
    """

    decay: float
    held_out: Tensor


def write_measured(path: Path, measured: Measured) -> None:
    """Write it; it is durable on return."""
    decay = torch.tensor(measured.decay, dtype=torch.float64)
    write_named_tensors(path, {"decay": decay, "held_out": measured.held_out})


def read_measured(path: Path) -> Measured | None:
    """Read what `write_measured` wrote; None: there is no such file.

    Raises:
        DamagedFile: it is not what was written.
    """
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    return Measured(float(tensors["decay"]), tensors["held_out"])
