"""The smashed data that the server keeps, so that no sample crosses the wire twice.

A sample lies here as it came: encoded, under an id that only its device can make. Memory first;
what has not been used for longest moves to files that are mapped into memory, and from there out
of the server. Nothing here is worth more than its traffic: whatever is missing is sent again.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import InvalidField, TooLarge

log = logging.getLogger(__name__)

_SEGMENT_BYTES = 8 * 1024 * 1024  # moved to disk together


@dataclass(frozen=True)
class Owner:
    """One participant of one run: nobody else's samples can be asked for."""

    run: str
    participant: str


@dataclass(frozen=True)
class RowForm:
    """How one sample is encoded: a codec that can be taken apart, its shape and its buffers."""

    codec: str
    shape: tuple[int, ...]  # (T, D)
    sizes: tuple[int, ...]  # bytes of each buffer, for one sample

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Kept:
    """A sample as it lies here. Its bytes stay, whatever becomes of the store."""

    form: RowForm
    data: bytes | memoryview
    version: int


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of what is kept, in bytes for one participant and in all, and in files.

    A file that is mapped holds one of the process's descriptors.
    """

    memory_bytes: int
    disk_bytes: int
    participant_bytes: int
    files: int = 1024


@dataclass(frozen=True)
class _Record:
    """A sample: in memory, or a stretch of a segment."""

    form: RowForm
    data: bytes | memoryview
    segment: _Segment | None = None
    version: int = 0


@dataclass(eq=False)
class _Segment:
    """A file of samples of one owner, all of them moved to disk together."""

    owner: Owner
    path: Path
    nbytes: int
    ids: set[bytes]


@dataclass
class _Shelf:
    """One owner's samples, the one unused for longest first."""

    records: OrderedDict[bytes, _Record] = field(default_factory=OrderedDict)
    nbytes: int = 0


class SampleStore:
    """Keeps encoded samples within `StoreLimits`. Methods may be called from many threads.

    Args:
        folder: for the files; those that an earlier process has left there are removed.
        limits: over them, the samples unused for longest go.
    """

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.samples"):
            left.unlink()
        self._folder = folder
        self._limits = limits
        self._lock = threading.Lock()  # guards all that follows
        self._shelves: OrderedDict[Owner, _Shelf] = OrderedDict()  # by last use
        self._segments: OrderedDict[_Segment, None] = OrderedDict()  # by last use
        self.memory_bytes = 0
        self.disk_bytes = 0

    def put(
        self,
        owner: Owner,
        form: RowForm,
        ids: Sequence[bytes],
        buffers: Sequence[memoryview],
    ) -> None:
        """Keep samples; ids that are here already are left as they are.

        Args:
            owner: whose they are.
            form: of each of them.
            ids: one for each sample.
            buffers: the codec's, for all of them together.

        Raises:
            TooLarge: one sample alone is over a limit.
        """
        self._add(owner, form, ids, buffers, None)

    def replace(
        self,
        owner: Owner,
        form: RowForm,
        ids: Sequence[bytes],
        buffers: Sequence[memoryview],
        versions: Sequence[int],
    ) -> None:
        """Keep samples that have a version, in the place of what is here under their ids.

        Args:
            owner, form, ids, buffers: as in `put`; no id twice.
            versions: one for each sample.

        Raises:
            TooLarge: one sample alone is over a limit.
        """
        self._add(owner, form, ids, buffers, versions)

    def find(self, owner: Owner, ids: Sequence[bytes]) -> list[Kept | None]:
        """Each sample as it is now, or None where it is not kept."""
        with self._lock:
            shelf = self._shelves.get(owner)
            if shelf is None:
                return [None] * len(ids)
            records = [
                self._use(owner, shelf, name) if name in shelf.records else None for name in ids
            ]
        return [
            None if record is None else Kept(record.form, record.data, record.version)
            for record in records
        ]

    def _add(
        self,
        owner: Owner,
        form: RowForm,
        ids: Sequence[bytes],
        buffers: Sequence[memoryview],
        versions: Sequence[int] | None,
    ) -> None:
        if form.nbytes > min(self._limits.participant_bytes, self._limits.memory_bytes):
            raise TooLarge(
                "a sample is larger than what the server keeps for a participant",
                field="smashed",
                limit=min(self._limits.participant_bytes, self._limits.memory_bytes),
                value=form.nbytes,
                hint="raise samples_mib, or switch wire.keep_smashed or wire.delta_smashed off",
            )
        with self._lock:
            shelf = self._shelves.setdefault(owner, _Shelf())
            self._shelves.move_to_end(owner)
            for row, name in enumerate(ids):
                if name in shelf.records and versions is None:
                    shelf.records.move_to_end(name)
                    continue
                if name in shelf.records:
                    self._take_off(shelf, name)
                data = b"".join(
                    buffer[row * size : (row + 1) * size]
                    for buffer, size in zip(buffers, form.sizes, strict=True)
                )
                version = 0 if versions is None else versions[row]
                shelf.records[name] = _Record(form, data, version=version)
                shelf.nbytes += len(data)
                self.memory_bytes += len(data)
            while shelf.nbytes > self._limits.participant_bytes:
                self._forget(owner, next(iter(shelf.records)))
            self._keep_within_memory()
            self._keep_within_disk()

    def missing(self, owner: Owner, ids: Sequence[bytes]) -> list[int]:
        """The places in ``ids`` of those that are not kept."""
        with self._lock:
            shelf = self._shelves.get(owner)
            known = shelf.records if shelf else {}
            return [place for place, name in enumerate(ids) if name not in known]

    def take(
        self, owner: Owner, ids: Sequence[bytes]
    ) -> tuple[RowForm, list[memoryview]] | list[int]:
        """The samples joined to the buffers of one tensor; or the places of those not kept.

        Where some are not, the others count as used all the same: when those are sent, they must
        not make room for them.

        Raises:
            InvalidField: they were not all sent in the same form.
        """
        with self._lock:
            shelf = self._shelves.get(owner)
            if shelf is None:
                return list(range(len(ids)))
            records = [self._use(owner, shelf, name) for name in ids if name in shelf.records]
            if len(records) < len(ids):
                return [place for place, name in enumerate(ids) if name not in shelf.records]
        form = records[0].form
        if any(record.form != form for record in records):
            raise InvalidField(
                "samples of one batch were sent with different codecs or shapes", field="ids"
            )
        return form, _joined(form, records)

    def drop(self, run: str, participant: str | None = None) -> None:
        """Forget the samples of a run, or of one of its participants."""
        with self._lock:
            for owner in list(self._shelves):
                if owner.run == run and participant in (None, owner.participant):
                    for name in list(self._shelves[owner].records):
                        self._forget(owner, name)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._shelves.clear()
            self.memory_bytes = self.disk_bytes = 0
            for segment in self._segments:
                segment.path.unlink(missing_ok=True)
            self._segments.clear()
            with contextlib.suppress(OSError):  # somebody else's files are in it
                self._folder.rmdir()

    # Under the lock

    def _use(self, owner: Owner, shelf: _Shelf, name: bytes) -> _Record:
        record = shelf.records[name]
        shelf.records.move_to_end(name)
        self._shelves.move_to_end(owner)
        if record.segment is not None:
            self._segments.move_to_end(record.segment)
        return record

    def _forget(self, owner: Owner, name: bytes) -> None:
        shelf = self._shelves[owner]
        self._take_off(shelf, name)
        if not shelf.records:
            del self._shelves[owner]

    def _take_off(self, shelf: _Shelf, name: bytes) -> None:
        record = shelf.records.pop(name)
        shelf.nbytes -= record.form.nbytes
        if record.segment is None:
            self.memory_bytes -= record.form.nbytes
        else:
            record.segment.ids.discard(name)
            if not record.segment.ids:
                self._unlink(record.segment)

    def _unlink(self, segment: _Segment) -> None:
        self._segments.pop(segment)
        self.disk_bytes -= segment.nbytes
        segment.path.unlink(missing_ok=True)  # a batch that still reads it keeps its pages

    def _keep_within_memory(self) -> None:
        while self.memory_bytes > self._limits.memory_bytes:
            owner, names = self._coldest()
            if self._limits.disk_bytes and self._moved_to_disk(owner, names):
                continue
            for name in names:
                self._forget(owner, name)

    def _coldest(self) -> tuple[Owner, list[bytes]]:
        """Samples in memory of the owner unused for longest: one, or up to a segment's worth."""
        most = min(_SEGMENT_BYTES, self._limits.memory_bytes // 4)
        for owner, shelf in self._shelves.items():
            names: list[bytes] = []
            nbytes = 0
            for name, record in shelf.records.items():
                if record.segment is None:
                    nbytes += record.form.nbytes
                    if names and nbytes > most:
                        break
                    names.append(name)
            if names:
                return owner, names
        raise LookupError("bytes are counted that no sample takes")

    def _moved_to_disk(self, owner: Owner, names: Iterable[bytes]) -> bool:
        """Whether these samples are on disk now; a full one takes none."""
        records = self._shelves[owner].records
        chosen = [(name, records[name]) for name in names]
        path = self._folder / f"{secrets.token_hex(8)}.samples"
        try:
            with path.open("w+b") as file:
                file.writelines(record.data for _, record in chosen)
                file.flush()
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            path.unlink(missing_ok=True)
            log.warning("samples could not be moved to disk and are forgotten: %s", error)
            return False
        segment = _Segment(owner, path, mapped.nbytes, {name for name, _ in chosen})
        self._segments[segment] = None
        self.disk_bytes += segment.nbytes
        start = 0
        for name, record in chosen:
            end = start + record.form.nbytes
            records[name] = _Record(record.form, mapped[start:end], segment, record.version)
            self.memory_bytes -= record.form.nbytes
            start = end
        return True

    def _keep_within_disk(self) -> None:
        limits = self._limits
        while self.disk_bytes > limits.disk_bytes or len(self._segments) > limits.files:
            coldest = next(iter(self._segments))
            for name in list(coldest.ids):
                self._forget(coldest.owner, name)


def _joined(form: RowForm, records: Sequence[_Record]) -> list[memoryview]:
    """One buffer for each of the codec's, the samples one after the other."""
    buffers, start = [], 0
    for size in form.sizes:
        parts = [memoryview(record.data)[start : start + size] for record in records]
        buffers.append(memoryview(bytearray(b"".join(parts))))
        start += size
    return buffers
