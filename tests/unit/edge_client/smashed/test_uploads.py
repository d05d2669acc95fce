"""Samples that the server keeps: only what it lacks is sent, under ids that tell it nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edge_client.data import BatchReader, ImageSet
from edge_client.data.image_set import ArrayStore
from edge_client.model import DeviceModel
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.training.context import Samples
from edge_client.transport import SamplesMissing
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
def model() -> DeviceModel:
    return shared_model()


class Plane:
    """The server's end: what it keeps, and every request in its order."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Tensor] = {}
        self.asked: list[list[bytes]] = []  # whether it lacks these
        self.sent: list[list[bytes]] = []
        self.threads: set[int] = set()
        self.refuse: Exception | None = None

    def missing(self, ids: Tensor) -> list[int]:
        self.asked.append(names(ids))
        return [place for place, name in enumerate(names(ids)) if name not in self.kept]

    def keep(self, ids: Tensor, smashed: Tensor) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.threads.add(threading.get_ident())
        self.sent.append(names(ids))
        self.kept |= zip(names(ids), smashed.clone(), strict=True)

    def request(self, ids: Tensor) -> Tensor:
        """Any request that names samples."""
        lacking = [place for place, name in enumerate(names(ids)) if name not in self.kept]
        if lacking:
            raise SamplesMissing(lacking)
        return torch.stack([self.kept[name] for name in names(ids)])

    @property
    def sent_names(self) -> list[bytes]:
        return [name for request in self.sent for name in request]


def names(ids: Tensor) -> list[bytes]:
    assert ids.dtype == torch.uint8
    assert ids.shape[1:] == (16,)
    return [bytes(row.tolist()) for row in ids]


MakeKept = Callable[..., SampleUploader]


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
def keeping(model: DeviceModel, plane: Plane) -> MakeKept:
    def one(
        images: BatchReader | None = None, secret: bytes = SECRET, form: str = "head float32"
    ) -> SampleUploader:
        images = images or reader(model)
        made = HeadOutputs(model.head, images, PLENTY)
        return SampleUploader(made, images, plane, secret, form)

    return one


def test_ids_are_the_samples_own_and_the_same_after_a_restart(keeping: MakeKept) -> None:
    ids = keeping().ids(EVERYTHING)
    assert (ids.shape, ids.dtype) == ((SAMPLES, 16), torch.uint8)
    assert len(set(names(ids))) == SAMPLES
    again = keeping()
    order = EVERYTHING.flip(0)
    assert torch.equal(again.ids(order[:5]), ids[order[:5]])
    assert torch.equal(again.ids(order), ids[order])
    assert torch.equal(again.ids(torch.tensor([3, 3, 1])), ids[[3, 3, 1]])


def test_ids_depend_on_the_secret_the_head_and_the_codec(keeping: MakeKept) -> None:
    devices = [
        keeping(),
        keeping(secret=b"t" * 32),
        keeping(form="other float32"),
        keeping(form="head int8"),
    ]
    found = [names(device.ids(EVERYTHING)) for device in devices]
    assert len({name for every in found for name in every}) == 4 * SAMPLES


def test_ids_depend_on_the_image_and_nothing_else_of_a_sample(
    model: DeviceModel, keeping: MakeKept
) -> None:
    pixels = torch.stack([image_set(4).image(number) for number in (0, 1, 2, 1)])
    pixels[2] = pixels[1]
    pixels[2, 0, 20, 20] += 40  # a small spot
    labels = torch.tensor([0, 1, 1, 2])
    images = BatchReader(ImageSet(ArrayStore(pixels), labels, CLASSES), model.preprocessing)
    first, second, spotted, twin = names(keeping(images).ids(torch.arange(4)))
    assert len({first, second, spotted}) == 3
    assert twin == second, "equal images are one, wherever they stand and whatever they show"


def test_ids_depend_on_the_view(model: DeviceModel, keeping: MakeKept) -> None:
    device = keeping(reader(model, augmented=True))
    found = [device.ids(EVERYTHING, view) for view in (None, 0, 1, 0)]
    assert torch.equal(found[1], found[3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        equal = (found[one] == found[other]).all(dim=1)
        assert equal.sum() <= 2, "hardly any image is the same in two views"


def test_a_sample_is_sent_once(plane: Plane, keeping: MakeKept) -> None:
    device = keeping()
    device.ensure(torch.arange(10))
    device.ensure(torch.arange(5, 20))
    device.ensure(torch.arange(20).flip(0))
    assert sorted(plane.sent_names) == sorted(names(device.ids(torch.arange(20))))
    assert [len(asked) for asked in plane.asked] == [10, 10], "no question without need"


def test_equal_images_are_sent_once(model: DeviceModel, plane: Plane, keeping: MakeKept) -> None:
    pixels = torch.stack([image_set(3).image(number) for number in (0, 1, 0, 2, 1)])
    images = ImageSet(ArrayStore(pixels), torch.zeros(5, dtype=torch.int64), CLASSES)
    device = keeping(BatchReader(images, model.preprocessing))
    device.ensure(torch.arange(5))
    assert len(plane.sent_names) == len(set(plane.sent_names)) == 3


def test_what_is_kept_is_the_samples_own_output(plane: Plane, keeping: MakeKept) -> None:
    device = keeping()
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    device.ensure(order)
    assert torch.equal(plane.request(device.ids(EVERYTHING)), everything())


def test_after_a_restart_only_what_the_server_lacks_is_sent(
    plane: Plane, keeping: MakeKept
) -> None:
    keeping().ensure(EVERYTHING)
    plane.sent.clear()
    device = keeping()
    device.ensure(EVERYTHING)
    assert plane.sent == []
    lost = names(device.ids(torch.tensor([3, 30])))
    for name in lost:
        del plane.kept[name]
    keeping().ensure(EVERYTHING)
    assert plane.sent_names == lost


def test_a_view_is_sent_beside_the_plain_image(
    model: DeviceModel, plane: Plane, keeping: MakeKept
) -> None:
    images = reader(model, augmented=True)
    device = keeping(images)
    for view in (None, 0, 1, 0):
        device.ensure(torch.arange(6), view)
    assert len(plane.sent_names) == len(plane.kept)
    expected = model.head(images.read(torch.arange(6), epoch=1)[0])
    found = plane.request(device.ids(torch.arange(6), 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_many_samples_go_in_several_requests_off_this_thread(
    model: DeviceModel, plane: Plane, keeping: MakeKept
) -> None:
    device = keeping(reader(model, 150))
    device.ensure(torch.arange(150))
    assert [len(sent) for sent in plane.sent] == [64, 64, 22]
    assert plane.sent_names == names(device.ids(torch.arange(150)))
    assert threading.get_ident() not in plane.threads
    assert not any(thread.name.startswith("upload") for thread in threading.enumerate())


def test_a_refusal_is_told(plane: Plane, keeping: MakeKept) -> None:
    plane.refuse = Busy("full")
    with pytest.raises(Busy):
        keeping().ensure(EVERYTHING)


# A batch by its ids


def test_samples_that_the_server_has_lost_are_sent_again(
    model: DeviceModel, plane: Plane, keeping: MakeKept
) -> None:
    device = keeping()
    samples = Samples(reader(model), outputs(model), device)
    device.ensure(EVERYTHING)
    positions = torch.tensor([30, 2, 7, 19])
    lost = names(device.ids(torch.tensor([2, 19])))
    for name in lost:
        del plane.kept[name]
    plane.sent.clear()
    found = samples.with_batch(positions, None, plane.request)
    assert torch.equal(found, everything()[positions])
    assert plane.sent_names == lost


def test_samples_are_sent_when_they_are_first_asked_for(
    model: DeviceModel, plane: Plane, keeping: MakeKept
) -> None:
    images = reader(model, augmented=True)
    device = keeping(images)
    samples = Samples(images, outputs(model, augmented=True), device)
    positions = torch.tensor([1, 0])
    for view in (None, 1):
        found = samples.with_batch(positions, view, plane.request)
        assert torch.equal(found, outputs(model, augmented=True).smashed(positions, view))
    device.ensure(positions, 1)
    assert (plane.asked, len(plane.sent)) == ([], 2)


def test_to_a_server_that_keeps_nothing_the_batch_goes_with_the_request(
    model: DeviceModel, plane: Plane, keeping: MakeKept
) -> None:
    samples = Samples(reader(model), outputs(model), keeping())

    def forgetful(batch: Tensor) -> Tensor:
        if batch.is_floating_point():
            return batch
        plane.kept.clear()
        return plane.request(batch)

    found = samples.with_batch(torch.arange(4), None, forgetful)
    assert torch.equal(found, everything()[:4])
    assert len(plane.sent) == 3


def test_without_kept_samples_the_smashed_data_themselves_go(model: DeviceModel) -> None:
    samples = Samples(reader(model), outputs(model))
    positions = torch.tensor([5, 1])
    found = samples.with_batch(positions, None, lambda batch: batch)
    assert torch.equal(found, everything()[positions])
