"""The smashed data as the server has them, so that a visit sends their changes and no more.

While the prompts in front of the head are tuned, a sample's smashed data differ a little from visit
to visit. Both ends hold the same copy of them, and what crosses is the change against that copy
(AQ-SGD, arXiv 2206.01299), or nothing where it is small (SplitCom, arXiv 2602.10564). What a codec
leaves out of one change is part of the next one, so errors do not add up.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from protocol.messages import SAMPLE_ID_BYTES

Sample = tuple[int, int | None]  # a position in the set, and which view of it; None: as it is

_SECRET_BYTES = 32

_NONE = -1  # the version of a copy that is not there


@dataclass(frozen=True)
class DeltaBatch:
    """A batch for the server, against the copies that it has.

    Attributes:
        samples: in the order of the rows, [B].
        tensors: of the request, each with its codec.
        decoded: what the server makes of them, [B, T, D].
        version: of the copies that are changed.
        sent: the rows of these.
    """

    samples: Sequence[Sample]
    tensors: Mapping[str, tuple[Tensor, str]]
    decoded: Tensor
    version: int
    sent: Sequence[int]

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class _Copy:
    version: int
    smashed: Tensor  # [T, D], float32

    @property
    def nbytes(self) -> int:
        return self.smashed.numel() * self.smashed.element_size()


class DeltaCache:
    """The copies of one set's samples, the one unused for longest first.

    A copy changes only once the server has said that its own did. Every revision has a version of
    its own, which is never used again: copies of one version are equal, whatever got lost.

    On the wire a sample's name is a hash of its position and view under a secret of this object.
    The position itself would tell of the label, where a set is sorted by classes.

    Args:
        whole: the codec of a sample's first sending.
        changes: the codec of all later ones.
        skip_below: a change of less than this share (L2) is not sent.
        limit_bytes: of the copies; over it, those unused for longest are forgotten, and these
            samples are sent whole again.
    """

    def __init__(self, whole: str, changes: str, skip_below: float, limit_bytes: int) -> None:
        self._whole = whole
        self._changes = changes
        self._skip_below = skip_below
        self._limit_bytes = limit_bytes
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._copies: OrderedDict[Sample, _Copy] = OrderedDict()  # by last use
        self._version = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._copies)

    def revise(self, samples: Sequence[Sample], smashed: Tensor) -> DeltaBatch:
        """What to send of these samples, each named once, now that they give this [B, T, D].

        Raises:
            InvalidField: a codec does not carry these numbers.
        """
        self._version += 1
        found = [self._copies.get(sample) for sample in samples]
        copies = {row: copy for row, copy in enumerate(found) if copy is not None}
        plain = smashed.detach().to(torch.float32)
        decoded = torch.empty_like(plain)
        for row, copy in copies.items():
            decoded[row] = copy.smashed
        fresh = [row for row in range(len(samples)) if row not in copies]
        moved = self._moved(list(copies), plain, decoded)
        tensors = {"ids": (self._ids(samples), "uint8")}
        if fresh:
            whole = plain[fresh]
            decoded[fresh] = as_decoded(whole, self._whole)
            tensors |= {"whole": (whole, self._whole), "whole_rows": _whole_numbers(fresh)}
        if moved:
            changes = plain[moved] - decoded[moved]
            decoded[moved] += as_decoded(changes, self._changes)
            tensors |= {"changes": (changes, self._changes), "change_rows": _whole_numbers(moved)}
        sent = sorted(fresh + moved)
        versions = [[copy.version if copy else _NONE] * 2 for copy in found]
        for row in sent:
            versions[row][1] = self._version
        tensors["versions"] = _whole_numbers(versions)
        return DeltaBatch(tuple(samples), tensors, decoded, self._version, sent)

    def confirm(self, revision: DeltaBatch) -> None:
        """The server has taken this revision."""
        for row in revision.sent:
            sample = revision.samples[row]
            self.forget([sample])
            self._copies[sample] = _Copy(revision.version, revision.decoded[row].clone())
            self.nbytes += self._copies[sample].nbytes
        for sample in revision.samples:
            if sample in self._copies:
                self._copies.move_to_end(sample)
        while self.nbytes > self._limit_bytes:
            self.forget([next(iter(self._copies))])

    def forget(self, samples: Iterable[Sample]) -> None:
        """The server lacks these: they are sent whole the next time."""
        for sample in samples:
            copy = self._copies.pop(sample, None)
            if copy is not None:
                self.nbytes -= copy.nbytes

    def _moved(self, rows: list[int], smashed: Tensor, copies: Tensor) -> list[int]:
        """Which of these rows of [B, T, D] differ too much from their copies to be left out."""
        if not self._skip_below or not rows:
            return rows
        change = torch.linalg.vector_norm(smashed[rows] - copies[rows], dim=(1, 2))
        size = torch.linalg.vector_norm(smashed[rows], dim=(1, 2))
        small = (change < self._skip_below * size).tolist()
        return [row for row, skipped in zip(rows, small, strict=True) if not skipped]

    def _ids(self, samples: Sequence[Sample]) -> Tensor:
        names = bytearray()
        for position, view in samples:
            digest = hashlib.blake2b(key=self._secret, digest_size=SAMPLE_ID_BYTES)
            digest.update(f"{position} {view}".encode())
            names += digest.digest()
        return torch.frombuffer(names, dtype=torch.uint8).reshape(-1, SAMPLE_ID_BYTES)


def _whole_numbers(numbers: Sequence[int] | Sequence[Sequence[int]]) -> tuple[Tensor, str]:
    return torch.tensor(numbers, dtype=torch.int64), "int64"
