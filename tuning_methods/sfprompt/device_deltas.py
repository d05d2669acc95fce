"""Encode smashed data as deltas against copies that device and server both cache.

While prompts at the input are tuned, a sample's smashed data change a little from visit to visit.
The device sends the change against the copy (AQ-SGD, arXiv 2206.01299), or nothing if the change is
small (SplitCom, arXiv 2602.10564). The next change contains the codec's error of this one, so that
errors do not add up.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.training.split_training import Sample
from protocol.codecs.registry import as_decoded
from protocol.messages import SAMPLE_ID_BYTES

_SECRET_BYTES = 32

_NO_COPY = -1  # the version of a copy that does not exist


@dataclass(frozen=True)
class DeltaBatch:
    """A batch as deltas against the server's copies.

    Attributes:
        samples: in the order of the rows, [B].
        tensors: the request's, each with its codec.
        decoded: the smashed data that the server rebuilds, [B, T, D].
        version: new version of the copies that change.
        sent: rows whose copies change.
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
    """Copies of one set's smashed data, the least recently used first.

    A copy changes only after the server has confirmed that it changed its own. Each batch has a new
    version: copies of one version are equal at both ends, whichever messages were lost.

    A sample's id on the wire is a hash of its position and view, keyed with a secret of this
    object. The position would reveal the label if the set is sorted by class.

    Args:
        whole: codec of a sample's smashed data when they are sent whole.
        changes: codec of their changes.
        skip_below: a relative change (L2) below this is not sent.
        max_bytes: memory budget. Above it, the least recently used copies are dropped; their
            samples are sent whole the next time.

    Attributes:
        nbytes: bytes of all copies.
    """

    def __init__(self, whole: str, changes: str, skip_below: float, max_bytes: int) -> None:
        self._whole = whole
        self._changes = changes
        self._skip_below = skip_below
        self._max_bytes = max_bytes
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._copies: OrderedDict[Sample, _Copy] = OrderedDict()  # by last use
        self._version = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._copies)

    def encode(self, samples: Sequence[Sample], smashed: Tensor) -> DeltaBatch:
        """Encode smashed data [B, T, D] of different samples [B]. The copies do not change yet.

        Raises:
            InvalidField: a codec cannot represent these numbers.
        """
        self._version += 1
        cached = [self._copies.get(sample) for sample in samples]
        copies = {row: copy for row, copy in enumerate(cached) if copy is not None}
        plain = smashed.detach().to(torch.float32)
        decoded = torch.empty_like(plain)
        for row, copy in copies.items():
            decoded[row] = copy.smashed
        new = [row for row in range(len(samples)) if row not in copies]
        changed = self._changed_rows(list(copies), plain, decoded)
        tensors = {"ids": (self._ids(samples), "uint8")}
        if new:
            whole = plain[new]
            decoded[new] = as_decoded(whole, self._whole)
            tensors |= {"whole": (whole, self._whole), "whole_rows": _integers(new)}
        if changed:
            changes = plain[changed] - decoded[changed]
            decoded[changed] += as_decoded(changes, self._changes)
            tensors |= {"changes": (changes, self._changes), "change_rows": _integers(changed)}
        sent = sorted(new + changed)
        versions = [[copy.version if copy else _NO_COPY] * 2 for copy in cached]
        for row in sent:
            versions[row][1] = self._version
        tensors["versions"] = _integers(versions)
        return DeltaBatch(tuple(samples), tensors, decoded, self._version, sent)

    def confirm(self, batch: DeltaBatch) -> None:
        """Change the copies: the server has answered this batch."""
        for row in batch.sent:
            sample = batch.samples[row]
            self.forget([sample])
            self._copies[sample] = _Copy(batch.version, batch.decoded[row].clone())
            self.nbytes += self._copies[sample].nbytes
        for sample in batch.samples:
            if sample in self._copies:
                self._copies.move_to_end(sample)
        while self.nbytes > self._max_bytes:
            self.forget([next(iter(self._copies))])

    def forget(self, samples: Iterable[Sample]) -> None:
        """Drop copies that the server lacks: their samples are sent whole the next time."""
        for sample in samples:
            copy = self._copies.pop(sample, None)
            if copy is not None:
                self.nbytes -= copy.nbytes

    def _changed_rows(self, rows: list[int], smashed: Tensor, copies: Tensor) -> list[int]:
        """Select the rows of [B, T, D] whose change from their copies is not small."""
        if not self._skip_below or not rows:
            return rows
        change = torch.linalg.vector_norm(smashed[rows] - copies[rows], dim=(1, 2))
        size = torch.linalg.vector_norm(smashed[rows], dim=(1, 2))
        small = (change < self._skip_below * size).tolist()
        return [row for row, skipped in zip(rows, small, strict=True) if not skipped]

    def _ids(self, samples: Sequence[Sample]) -> Tensor:
        ids = bytearray()
        for position, view in samples:
            digest = hashlib.blake2b(key=self._secret, digest_size=SAMPLE_ID_BYTES)
            digest.update(f"{position} {view}".encode())
            ids += digest.digest()
        return torch.frombuffer(ids, dtype=torch.uint8).reshape(-1, SAMPLE_ID_BYTES)


def _integers(numbers: Sequence[int] | Sequence[Sequence[int]]) -> tuple[Tensor, str]:
    return torch.tensor(numbers, dtype=torch.int64), "int64"
