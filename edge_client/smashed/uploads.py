"""The device's side of the samples that the server keeps: each is sent once."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from edge_client.data import BatchReader
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.transport.split_client import SplitPlane, max_samples_per_frame
from protocol.messages import SAMPLE_ID_BYTES

_CHUNK = 64  # samples sent together: what is lost when a connection breaks


class SampleUploader:
    """One set's samples by the ids under which the server keeps their smashed data.

    An id is a hash of the image, the head and the codec under a secret of the device: equal
    content has equal ids on one device, and nobody else can tell which image an id stands for.

    Args:
        outputs: makes the smashed data.
        samples: the set.
        plane: where they are sent.
        secret: of the device; at most 64 bytes.
        form: names head and codec.
    """

    def __init__(
        self,
        outputs: HeadOutputs,
        samples: BatchReader,
        plane: SplitPlane,
        secret: bytes,
        form: str,
    ) -> None:
        self._outputs = outputs
        self._chunk = max_samples_per_frame(outputs.head, _CHUNK)
        self._samples = samples
        self._plane = plane
        self._secret = secret
        self._form = form.encode()
        self._ids: dict[tuple[int, int | None], bytes] = {}  # by position and view
        self._sent: set[bytes] = set()

    def ids(self, positions: Tensor, view: int | None = None) -> Tensor:
        """The ids [B, 16] of the samples at these positions [B], as uint8."""
        keys = [(position, view) for position in positions.tolist()]
        fresh = [key for key in keys if key not in self._ids]
        if fresh:
            places = torch.tensor([position for position, _ in fresh])
            for chunk in places.split(self._chunk):
                images, _ = self._samples.read(chunk, epoch=view)
                for position, image in zip(chunk.tolist(), images, strict=True):
                    self._ids[position, view] = self._name(image)
        data = bytearray(b"".join(self._ids[key] for key in keys))
        return torch.frombuffer(data, dtype=torch.uint8).reshape(-1, SAMPLE_ID_BYTES)

    def ensure(self, positions: Tensor, view: int | None = None) -> None:
        """See that the server keeps these samples; what it has, also from earlier, is not sent."""
        unsent: dict[bytes, int] = {}  # the first row of each: equal images are one sample
        for row, name in enumerate(self._names(positions, view)):
            if name not in self._sent:
                unsent.setdefault(name, row)
        if not unsent:
            return
        asked = positions[torch.tensor(list(unsent.values()))]
        lacking = self._plane.missing(self.ids(asked, view))
        self._sent.update(unsent)
        if lacking:
            self.send(asked[torch.tensor(lacking)], view)

    def send(self, positions: Tensor, view: int | None = None) -> None:
        """Send these samples. The head computes the next chunk while one is on its way."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload") as uploads:
            under_way: Future[None] | None = None
            for chunk in positions.split(self._chunk):
                ids, smashed = self.ids(chunk, view), self._outputs.smashed(chunk, view)
                if under_way is not None:
                    under_way.result()
                under_way = uploads.submit(self._plane.keep, ids, smashed)
            if under_way is not None:
                under_way.result()
        self._sent.update(self._names(positions, view))

    def _names(self, positions: Tensor, view: int | None) -> list[bytes]:
        self.ids(positions, view)
        return [self._ids[position, view] for position in positions.tolist()]

    def _name(self, image: Tensor) -> bytes:
        digest = hashlib.blake2b(key=self._secret, digest_size=SAMPLE_ID_BYTES)
        digest.update(len(self._form).to_bytes(4, "little") + self._form)
        digest.update(image.contiguous().numpy().tobytes())
        return digest.digest()
