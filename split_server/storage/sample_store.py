"""Smashed data stored for later steps, so that no sample crosses the wire twice.

A sample is stored in the codec's form, as it arrived, under an id that only its device can compute.
The least recently used samples move from memory to mapped files, and are dropped from there. A
dropped sample costs only its traffic: the device sends it again.

Memory and disk are shared equally: a participant that uses no more than its share loses nothing to
others, however much they send. What one does not use of its share, others may.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_64_intdigest

from protocol.errors import InvalidField, TooLarge
from split_server.storage.segments import Segment, SegmentFolder

log = logging.getLogger(__name__)

_SEGMENT_BYTES = 8 * 1024 * 1024  # moved to disk together


@dataclass(frozen=True)
class Owner:
    """One participant of one run; each has access to its own samples only."""

    run: str
    participant: str


@dataclass(frozen=True)
class RowForm:
    """The encoded form of one sample.

    Attributes:
        codec: name of a codec whose buffers can be split by samples.
        shape: (T, D).
        sizes: bytes of each buffer, for one sample.
    """

    codec: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class StoredSample:
    """An encoded sample. Its bytes stay valid after the store has dropped it."""

    form: RowForm
    data: bytes | memoryview
    checksum: int | None = None  # of a sample on disk

    @property
    def is_damaged(self) -> bool:
        """Whether the disk returns other bytes than were written."""
        return self.checksum is not None and xxh3_64_intdigest(self.data) != self.checksum


@dataclass(frozen=True)
class StoreLimits:
    """Limits of the sample store.

    Attributes:
        memory_bytes: bytes of all samples in memory.
        disk_bytes: bytes of all samples on disk.
        participant_bytes: bytes of one participant's samples, in memory and on disk.
        files: number of mapped files; each uses one of the process's file descriptors.
    """

    memory_bytes: int
    disk_bytes: int
    participant_bytes: int
    files: int = 1024


@dataclass(frozen=True)
class _Record:
    """A sample in memory, or in a segment on disk."""

    sample: StoredSample
    segment: Segment | None = None

    @property
    def nbytes(self) -> int:
        return self.sample.form.nbytes


@dataclass
class _OwnerRecords:
    """One owner's samples, least recently used first.

    Attributes:
        nbytes: of the samples, in memory and on disk.
        memory_bytes: of those in memory.
        disk_bytes, segments: of its files, with samples in them that have been dropped.
    """

    records: OrderedDict[bytes, _Record] = field(default_factory=OrderedDict)
    nbytes: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    segments: int = 0


@dataclass(frozen=True)
class _SegmentContent:
    """The samples of a segment that have not been dropped; all are of one owner."""

    owner: Owner
    ids: set[bytes]


class SampleStore:
    """Stores encoded samples within `StoreLimits`. Thread-safe.

    Args:
        folder: for files; samples of an earlier process are removed from it.
        limits: above them, the least recently used samples of those owners are dropped that use
            more than an equal share.
    """

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        self._folder = SegmentFolder(folder)
        self._limits = limits
        self._lock = threading.Lock()  # guards everything below
        self._owners: OrderedDict[Owner, _OwnerRecords] = OrderedDict()  # by last use
        self._segments: OrderedDict[Segment, _SegmentContent] = OrderedDict()  # by last use
        self.memory_bytes = 0
        self.disk_bytes = 0

    def put(
        self,
        owner: Owner,
        form: RowForm,
        ids: Sequence[bytes],
        buffers: Sequence[memoryview],
        *,
        replace: bool = False,
    ) -> None:
        """Store samples.

        Args:
            owner: the samples' owner.
            form: the form of each sample.
            ids: one id for each sample.
            buffers: the codec's buffers, each for all samples.
            replace: whether they replace stored samples of the same ids, which differ from each
                other; else those stay as they are.

        Raises:
            TooLarge: one sample alone exceeds a limit.
        """
        limit = min(self._limits.participant_bytes, self._limits.memory_bytes)
        if form.nbytes > limit:
            raise TooLarge(
                "a sample exceeds the server's memory for one participant's samples",
                field="smashed",
                limit=limit,
                value=form.nbytes,
                hint="raise samples_mib, or cache no smashed data in this run",
            )
        with self._lock:
            stored = self._owners.setdefault(owner, _OwnerRecords())
            self._owners.move_to_end(owner)
            for row, id_ in enumerate(ids):
                if id_ in stored.records:
                    if not replace:
                        stored.records.move_to_end(id_)
                        continue
                    self._remove(stored, id_)
                data = b"".join(
                    buffer[row * size : (row + 1) * size]
                    for buffer, size in zip(buffers, form.sizes, strict=True)
                )
                stored.records[id_] = _Record(StoredSample(form, data))
                stored.nbytes += len(data)
                stored.memory_bytes += len(data)
                self.memory_bytes += len(data)
            while stored.nbytes > self._limits.participant_bytes:
                self._drop(owner, next(iter(stored.records)))
            self._free_memory()
            self._free_disk()

    def find(self, owner: Owner, ids: Sequence[bytes]) -> list[StoredSample | None]:
        """Return each stored sample; None for an id that is not stored."""
        with self._lock:
            stored = self._owners.get(owner)
            if stored is None:
                return [None] * len(ids)
            found = [
                self._use(owner, stored, id_).sample if id_ in stored.records else None
                for id_ in ids
            ]
        damaged = {id_ for id_, each in zip(ids, found, strict=True) if each and each.is_damaged}
        self._drop_damaged(owner, damaged)
        return [None if id_ in damaged else each for id_, each in zip(ids, found, strict=True)]

    def list_missing(self, owner: Owner, ids: Sequence[bytes]) -> list[int]:
        """Return the positions in ``ids`` of samples that are not stored."""
        with self._lock:
            stored = self._owners.get(owner)
            records = stored.records if stored else {}
            return [position for position, id_ in enumerate(ids) if id_ not in records]

    def take(
        self, owner: Owner, ids: Sequence[bytes]
    ) -> tuple[RowForm, list[memoryview]] | list[int]:
        """Join samples to the buffers of one tensor.

        Returns:
            The samples' form and the buffers; or, if some are not stored, their positions. The
            others then count as used, so that the missing samples will not replace them.

        Raises:
            InvalidField: the samples have different forms.
        """
        with self._lock:
            stored = self._owners.get(owner)
            if stored is None:
                return list(range(len(ids)))
            samples = [self._use(owner, stored, id_).sample for id_ in ids if id_ in stored.records]
            if len(samples) < len(ids):
                return [place for place, id_ in enumerate(ids) if id_ not in stored.records]
        damaged = [place for place, sample in enumerate(samples) if sample.is_damaged]
        if damaged:
            self._drop_damaged(owner, {ids[place] for place in damaged})
            return damaged
        form = samples[0].form
        if any(sample.form != form for sample in samples):
            raise InvalidField(
                "samples of one batch were sent with different codecs or shapes", field="ids"
            )
        return form, _join(form, samples)

    def drop(self, run: str, participant: str | None = None) -> None:
        """Drop the samples of a run, or of one of its participants."""
        with self._lock:
            for owner in list(self._owners):
                if owner.run == run and participant in (None, owner.participant):
                    for id_ in list(self._owners[owner].records):
                        self._drop(owner, id_)

    def close(self) -> None:
        """Drop all samples and remove their files."""
        with self._lock:
            self._owners.clear()
            self.memory_bytes = self.disk_bytes = 0
            for segment in self._segments:
                self._folder.remove(segment)
            self._segments.clear()
            self._folder.close()

    def _drop_damaged(self, owner: Owner, ids: Iterable[bytes]) -> None:
        """Drop samples that the disk has changed: their device sends them again."""
        with self._lock:
            for id_ in ids:
                if owner in self._owners and id_ in self._owners[owner].records:
                    log.warning("a sample on disk is damaged and is dropped")
                    self._drop(owner, id_)

    # Under the lock

    def _use(self, owner: Owner, stored: _OwnerRecords, id_: bytes) -> _Record:
        record = stored.records[id_]
        stored.records.move_to_end(id_)
        self._owners.move_to_end(owner)
        if record.segment is not None:
            self._segments.move_to_end(record.segment)
        return record

    def _drop(self, owner: Owner, id_: bytes) -> None:
        stored = self._owners[owner]
        self._remove(stored, id_)
        if not stored.records:
            del self._owners[owner]

    def _remove(self, stored: _OwnerRecords, id_: bytes) -> None:
        record = stored.records.pop(id_)
        stored.nbytes -= record.nbytes
        if record.segment is None:
            stored.memory_bytes -= record.nbytes
            self.memory_bytes -= record.nbytes
            return
        content = self._segments[record.segment]
        content.ids.discard(id_)
        if not content.ids:
            del self._segments[record.segment]
            stored.segments -= 1
            stored.disk_bytes -= record.segment.data.nbytes
            self.disk_bytes -= record.segment.data.nbytes
            self._folder.remove(record.segment)

    def _free_memory(self) -> None:
        while self.memory_bytes > self._limits.memory_bytes:
            owner, ids = self._next_in_memory()
            if self._limits.disk_bytes and self._move_to_disk(owner, ids):
                continue
            for id_ in ids:
                self._drop(owner, id_)

    def _next_in_memory(self) -> tuple[Owner, list[bytes]]:
        """Choose samples in memory to free: one, or up to a segment's size, all of one owner.

        They are those of the least recent owner with more than its share. Its newest sample stays
        if it is the only one, and others lose samples instead: a sample just sent must not vanish.
        """
        share = self._limits.memory_bytes / len(self._owners)
        greedy = [
            (owner, stored)
            for owner, stored in self._owners.items()
            if stored.memory_bytes > share and stored.memory_bytes > self._newest_bytes(stored)
        ]
        for owner, stored in greedy or self._owners.items():
            if ids := self._oldest_in_memory(stored):
                return owner, ids
        raise LookupError("memory_bytes counts bytes of no sample")

    def _newest_bytes(self, stored: _OwnerRecords) -> int:
        return stored.records[next(reversed(stored.records))].nbytes

    def _oldest_in_memory(self, stored: _OwnerRecords) -> list[bytes]:
        max_bytes = min(_SEGMENT_BYTES, self._limits.memory_bytes // 4)
        ids: list[bytes] = []
        nbytes = 0
        for id_, record in stored.records.items():
            if record.segment is None:
                nbytes += record.nbytes
                if ids and nbytes > max_bytes:
                    break
                ids.append(id_)
        return ids

    def _move_to_disk(self, owner: Owner, ids: Iterable[bytes]) -> bool:
        """Move samples to a new segment; return whether that succeeded."""
        stored = self._owners[owner]
        records = stored.records
        samples = {id_: records[id_].sample for id_ in ids}
        segment = self._folder.write(sample.data for sample in samples.values())
        if segment is None:
            return False
        self._segments[segment] = _SegmentContent(owner, set(samples))
        self.disk_bytes += segment.data.nbytes
        stored.disk_bytes += segment.data.nbytes
        stored.segments += 1
        start = 0
        for id_, sample in samples.items():
            end = start + sample.form.nbytes
            checksum = xxh3_64_intdigest(sample.data)
            on_disk = StoredSample(sample.form, segment.data[start:end], checksum)
            records[id_] = _Record(on_disk, segment)
            stored.memory_bytes -= sample.form.nbytes
            self.memory_bytes -= sample.form.nbytes
            start = end
        return True

    def _free_disk(self) -> None:
        limits = self._limits
        while self.disk_bytes > limits.disk_bytes or len(self._segments) > limits.files:
            content = self._next_segment(is_full=self.disk_bytes > limits.disk_bytes)
            for id_ in list(content.ids):
                self._drop(content.owner, id_)

    def _next_segment(self, *, is_full: bool) -> _SegmentContent:
        """Choose the least recently used segment of an owner with more than its share.

        Args:
            is_full: whether bytes are short; else files are.
        """
        limits, owners = self._limits, len(self._owners)
        for content in self._segments.values():
            stored = self._owners[content.owner]
            if is_full and stored.disk_bytes * owners > limits.disk_bytes:
                return content
            if not is_full and stored.segments * owners > limits.files:
                return content
        raise LookupError("disk_bytes counts bytes of no segment")


def _join(form: RowForm, samples: Sequence[StoredSample]) -> list[memoryview]:
    """Join samples to buffers: each of the codec's buffers, for all samples."""
    buffers, start = [], 0
    for size in form.sizes:
        parts = [memoryview(sample.data)[start : start + size] for sample in samples]
        buffers.append(memoryview(bytearray(b"".join(parts))))
        start += size
    return buffers
