"""Uploads to the server's cache: only missing samples are sent, under ids that reveal nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from edge_client.data.batches import BatchReader
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.torch_model import TorchModel
from edge_client.training.context import Samples
from edge_client.transport.split_client import SamplesMissing
from protocol.errors import Busy
from tests.support.edge import CLASSES, image_set
from tests.support.heads import (
    EVERYTHING,
    PLENTY,
    SAMPLES,
    everything,
    outputs,
    reader,
    shared_model,
)

SECRET = b"s" * 32


@pytest.fixture
def model() -> TorchModel:
    return shared_model()


class Plane:
    """A server's sample cache, with all requests in their order."""

    def __init__(self) -> None:
        self.cache: dict[bytes, np.ndarray] = {}
        self.queries: list[list[bytes]] = []  # ids asked for by `missing`
        self.sent: list[list[bytes]] = []
        self.threads: set[int] = set()
        self.refuse: Exception | None = None

    def missing(self, ids: np.ndarray) -> list[int]:
        self.queries.append(names(ids))
        return [place for place, name in enumerate(names(ids)) if name not in self.cache]

    def store_samples(self, ids: np.ndarray, smashed: np.ndarray) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.threads.add(threading.get_ident())
        self.sent.append(names(ids))
        self.cache |= zip(names(ids), smashed.copy(), strict=True)

    def request(self, ids: np.ndarray) -> np.ndarray:
        """Answer a request that names samples by id."""
        missing = [place for place, name in enumerate(names(ids)) if name not in self.cache]
        if missing:
            raise SamplesMissing(missing)
        return np.stack([self.cache[name] for name in names(ids)])

    @property
    def sent_names(self) -> list[bytes]:
        return [name for request in self.sent for name in request]


def names(ids: np.ndarray) -> list[bytes]:
    assert ids.dtype == np.uint8
    assert ids.shape[1:] == (16,)
    return [bytes(row.tolist()) for row in ids]


MakeUploader = Callable[..., SampleUploader]


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
def new_uploader(model: TorchModel, plane: Plane) -> MakeUploader:
    def create(
        images: BatchReader | None = None,
        secret: bytes = SECRET,
        form: str = "head float32",
        *,
        joint: bool = False,
    ) -> SampleUploader:
        images = images or reader(model)
        head_outputs = HeadOutputs(model, images, PLENTY)
        return SampleUploader(head_outputs, images, plane, secret, form, joint=joint)

    return create


def test_ids_are_unique_and_the_same_after_a_restart(new_uploader: MakeUploader) -> None:
    ids = new_uploader().ids(EVERYTHING)
    assert (ids.shape, ids.dtype) == ((SAMPLES, 16), np.uint8)
    assert len(set(names(ids))) == SAMPLES
    again = new_uploader()
    order = EVERYTHING[::-1]
    assert np.array_equal(again.ids(order[:5]), ids[order[:5]])
    assert np.array_equal(again.ids(order), ids[order])
    assert np.array_equal(again.ids(np.array([3, 3, 1])), ids[[3, 3, 1]])


def test_ids_depend_on_the_secret_the_head_and_the_codec(new_uploader: MakeUploader) -> None:
    uploaders = [
        new_uploader(),
        new_uploader(secret=b"t" * 32),
        new_uploader(form="other float32"),
        new_uploader(form="head int8"),
    ]
    ids = [names(uploader.ids(EVERYTHING)) for uploader in uploaders]
    assert len({name for device_ids in ids for name in device_ids}) == 4 * SAMPLES


def test_ids_depend_on_the_image_alone(model: TorchModel, new_uploader: MakeUploader) -> None:
    pixels = np.stack([image_set(4).image(number) for number in (0, 1, 2, 1)])
    pixels[2] = pixels[1]
    pixels[2, 0, 20, 20] += 40  # a small spot
    labels = np.array([0, 1, 1, 2])
    images = BatchReader(ImageSet(ArrayStore(pixels), labels, CLASSES), model.preprocessing)
    first, second, spotted, twin = names(new_uploader(images).ids(np.arange(4)))
    assert len({first, second, spotted}) == 3
    assert twin == second, "equal images have one id, at any position and with any label"


def test_ids_depend_on_the_view(model: TorchModel, new_uploader: MakeUploader) -> None:
    uploader = new_uploader(reader(model, augmented=True))
    ids = [uploader.ids(EVERYTHING, view) for view in (None, 0, 1, 0)]
    assert np.array_equal(ids[1], ids[3])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        equal = (ids[a] == ids[b]).all(axis=1)
        assert equal.sum() <= 2, "hardly any image is the same in two views"


def test_a_sample_is_sent_once(plane: Plane, new_uploader: MakeUploader) -> None:
    uploader = new_uploader()
    uploader.ensure(np.arange(10))
    uploader.ensure(np.arange(5, 20))
    uploader.ensure(np.arange(20)[::-1])
    assert sorted(plane.sent_names) == sorted(names(uploader.ids(np.arange(20))))
    assert [len(query) for query in plane.queries] == [10, 10], (
        "no query for samples that were sent"
    )


def test_a_device_without_images_sends_none(plane: Plane, new_uploader: MakeUploader) -> None:
    new_uploader().ensure(np.arange(0))
    assert plane.queries == []


def test_equal_images_are_sent_once(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    pixels = np.stack([image_set(3).image(number) for number in (0, 1, 0, 2, 1)])
    images = ImageSet(ArrayStore(pixels), np.zeros(5, np.int64), CLASSES)
    uploader = new_uploader(BatchReader(images, model.preprocessing))
    uploader.ensure(np.arange(5))
    assert len(plane.sent_names) == len(set(plane.sent_names)) == 3


def test_each_upload_is_its_sample_s_output(plane: Plane, new_uploader: MakeUploader) -> None:
    uploader = new_uploader()
    order = np.random.default_rng(1).permutation(SAMPLES)
    uploader.ensure(order)
    assert np.array_equal(plane.request(uploader.ids(EVERYTHING)), everything())


def test_after_a_restart_only_missing_samples_are_sent(
    plane: Plane, new_uploader: MakeUploader
) -> None:
    new_uploader().ensure(EVERYTHING)
    plane.sent.clear()
    uploader = new_uploader()
    uploader.ensure(EVERYTHING)
    assert plane.sent == []
    lost = names(uploader.ids(np.array([3, 30])))
    for name in lost:
        del plane.cache[name]
    new_uploader().ensure(EVERYTHING)
    assert plane.sent_names == lost


def test_a_view_is_sent_in_addition_to_the_plain_image(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    images = reader(model, augmented=True)
    uploader = new_uploader(images)
    for view in (None, 0, 1, 0):
        uploader.ensure(np.arange(6), view)
    assert len(plane.sent_names) == len(plane.cache)
    expected = model.smashed(images.read(np.arange(6), epoch=1)[0])
    smashed = plane.request(uploader.ids(np.arange(6), 1))
    np.testing.assert_allclose(smashed, expected, rtol=1e-5, atol=1e-5)


def test_many_samples_are_sent_in_several_requests_on_another_thread(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    uploader = new_uploader(reader(model, 150))
    uploader.ensure(np.arange(150))
    assert [len(sent) for sent in plane.sent] == [50, 50, 50]
    assert plane.sent_names == names(uploader.ids(np.arange(150)))
    assert threading.get_ident() not in plane.threads
    assert not any(thread.name.startswith("upload") for thread in threading.enumerate())


def test_samples_that_are_encoded_together_are_sent_in_larger_requests(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    tokens = model.head.sizes.tokens
    assert 64 * tokens < 4096
    uploader = new_uploader(reader(model, 150), joint=True)
    uploader.ensure(np.arange(150))
    requests = -(-150 * tokens // 4096)
    assert len(plane.sent) == requests
    assert max(map(len, plane.sent)) - min(map(len, plane.sent)) <= 1


def test_samples_that_are_encoded_together_are_sent_again_together(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    uploader = new_uploader(reader(model, 150), joint=True)
    uploader.ensure(np.arange(150))
    sent, lost = list(plane.sent), plane.sent[0][3]
    del plane.cache[lost]
    uploader.send(np.array([3]))
    assert plane.sent == [*sent, sent[0]]
    again = new_uploader(reader(model, 150), joint=True)  # of the device after a restart
    again.send(np.array([3, 7]))
    assert plane.sent == [*sent, sent[0], sent[0]]


def test_an_id_of_samples_that_are_encoded_together_depends_on_all_of_them(
    model: TorchModel, new_uploader: MakeUploader
) -> None:
    first, more = (new_uploader(reader(model, count), joint=True) for count in (10, 11))
    assert names(first.ids(np.arange(10))) != names(more.ids(np.arange(10)))


def test_a_refused_upload_raises(plane: Plane, new_uploader: MakeUploader) -> None:
    plane.refuse = Busy("full")
    with pytest.raises(Busy):
        new_uploader().ensure(EVERYTHING)


# A batch by its ids


def test_samples_that_the_server_has_lost_are_sent_again(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    uploader = new_uploader()
    samples = Samples(reader(model), outputs(model), uploader)
    uploader.ensure(EVERYTHING)
    positions = np.array([30, 2, 7, 19])
    lost = names(uploader.ids(np.array([2, 19])))
    for name in lost:
        del plane.cache[name]
    plane.sent.clear()
    smashed = samples.request_with_batch(positions, None, plane.request)
    assert np.array_equal(smashed, everything()[positions])
    assert plane.sent_names == lost


def test_samples_are_sent_at_the_first_request_for_them(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    images = reader(model, augmented=True)
    uploader = new_uploader(images)
    samples = Samples(images, outputs(model, augmented=True), uploader)
    positions = np.array([1, 0])
    for view in (None, 1):
        smashed = samples.request_with_batch(positions, view, plane.request)
        assert np.array_equal(smashed, outputs(model, augmented=True).smashed(positions, view))
    uploader.ensure(positions, 1)
    assert (plane.queries, len(plane.sent)) == ([], 2)


def test_if_the_server_caches_nothing_the_request_carries_the_batch(
    model: TorchModel, plane: Plane, new_uploader: MakeUploader
) -> None:
    samples = Samples(reader(model), outputs(model), new_uploader())

    def forgetful(batch: np.ndarray) -> np.ndarray:
        if batch.dtype.kind == "f":
            return batch
        plane.cache.clear()
        return plane.request(batch)

    smashed = samples.request_with_batch(np.arange(4), None, forgetful)
    assert np.array_equal(smashed, everything()[:4])
    assert len(plane.sent) == 3


def test_without_an_uploader_the_request_carries_the_smashed_data(model: TorchModel) -> None:
    samples = Samples(reader(model), outputs(model))
    positions = np.array([5, 1])
    smashed = samples.request_with_batch(positions, None, lambda batch: batch)
    assert np.array_equal(smashed, everything()[positions])
