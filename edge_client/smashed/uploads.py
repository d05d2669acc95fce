"""Upload smashed data to the server's cache, each sample once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from edge_client.data.batches import BatchReader, Floats
from edge_client.data.image_set import Labels
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.transport.split_client import Ids, SplitPlane
from protocol.messages import SAMPLE_ID_BYTES

_CHUNK = 64  # samples in one request: an interrupted request is sent again

_JOINT_TOKENS = 4096  # in one request, of a codec that needs fewer bytes for each the more they are


class SampleUploader:
    """Uploads one set's smashed data, under an id for each sample.

    An id is a keyed hash of the image, the head and the codec: equal images have equal ids on one
    device, and an id reveals nothing about its image without the device's secret.

    What a joint codec makes of a sample depends on those beside it. It encodes fixed groups of the
    set, which are always sent whole, and whose content enters the ids: an id names one value,
    whatever the server loses.

    Args:
        outputs: computes the smashed data.
        samples: reads the set's images.
        plane: receives the uploads.
        secret: the device's secret, at most 64 bytes.
        form: identifies head and codec.
        joint: the codec encodes the samples of a request together, and not one by one.
    """

    def __init__(
        self,
        outputs: HeadOutputs,
        samples: BatchReader,
        plane: SplitPlane,
        secret: bytes,
        form: str,
        *,
        joint: bool = False,
    ) -> None:
        self._outputs = outputs
        samples_per_request = -(-_JOINT_TOKENS // outputs.model.tokens) if joint else 0
        self._chunk = outputs.model.samples_per_frame(max(_CHUNK, samples_per_request))
        self._joint = joint
        self._samples = samples
        self._plane = plane
        self._secret = secret
        self._form = form.encode()
        self._ids: dict[tuple[int, int | None], bytes] = {}  # by position and view
        self._sent: set[bytes] = set()

    def ids(self, positions: Labels, view: int | None = None) -> Ids:
        """Return the ids [B, 16], uint8, of the samples at these positions [B]."""
        keys = [(position, view) for position in positions.tolist()]
        absent = [key for key in keys if key not in self._ids]
        if absent:
            for chunk in self._chunks(np.array([position for position, _ in absent], np.int64)):
                images, _ = self._samples.read(chunk, epoch=view)
                group = _digest_of(images) if self._joint else b""
                for position, image in zip(chunk.tolist(), images, strict=True):
                    self._ids[position, view] = self._id(image, group)
        data = b"".join(self._ids[key] for key in keys)
        return np.frombuffer(data, np.uint8).reshape(-1, SAMPLE_ID_BYTES)

    def ensure(self, positions: Labels, view: int | None = None) -> None:
        """Upload those of these samples that the server does not have, also from earlier runs."""
        if not len(positions):  # a device may have no images to test on
            return
        unsent: dict[bytes, int] = {}  # the first row with each id: equal images are one sample
        for row, sample_id in enumerate(self._ids_of(positions, view)):
            if sample_id not in self._sent:
                unsent.setdefault(sample_id, row)
        if not unsent:
            return
        candidates = positions[list(unsent.values())]
        missing = self._plane.missing(self.ids(candidates, view))
        self._sent.update(unsent)
        if missing:
            self.send(candidates[missing], view)

    def send(self, positions: Labels, view: int | None = None) -> None:
        """Upload these samples; the head computes the next chunk during an upload."""
        chunks = self._chunks(positions)
        if self._joint:
            chunks = [self._distinct(group, view) for group in chunks]
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload") as uploads:
            current: Future[None] | None = None
            for chunk in chunks:
                ids, smashed = self.ids(chunk, view), self._outputs.smashed(chunk, view)
                if current is not None:
                    current.result()
                current = uploads.submit(self._plane.store_samples, ids, smashed)
            if current is not None:
                current.result()
        for chunk in chunks:
            self._sent.update(self._ids_of(chunk, view))

    def _chunks(self, positions: Labels) -> Sequence[Labels]:
        """Divide these samples into requests; a joint codec's are whole groups of the set."""
        if not self._joint:
            return np.array_split(positions, _count(len(positions), self._chunk))
        samples = len(self._samples)
        groups = np.array_split(np.arange(samples), _count(samples, self._chunk))
        return [group for group in groups if np.isin(group, positions).any()]

    def _distinct(self, positions: Labels, view: int | None) -> Labels:
        """Return the first of these positions with each id."""
        first: dict[bytes, int] = {}
        for position, sample_id in zip(
            positions.tolist(), self._ids_of(positions, view), strict=True
        ):
            first.setdefault(sample_id, position)
        return np.array(list(first.values()), np.int64)

    def _ids_of(self, positions: Labels, view: int | None) -> list[bytes]:
        self.ids(positions, view)
        return [self._ids[position, view] for position in positions.tolist()]

    def _id(self, image: Floats, group: bytes) -> bytes:
        """Return the id of an image, of the group with this digest."""
        digest = hashlib.blake2b(key=self._secret, digest_size=SAMPLE_ID_BYTES)
        form = self._form + group
        digest.update(len(form).to_bytes(4, "little") + form)
        digest.update(image.tobytes())
        return digest.digest()


def _count(samples: int, chunk: int) -> int:
    """Return the number of requests for so many samples."""
    return max(1, -(-samples // chunk))


def _digest_of(images: Floats) -> bytes:
    return hashlib.blake2b(images.tobytes()).digest()
