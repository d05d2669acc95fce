"""Images that are added or removed while a device takes part, or between two joins."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from PIL import Image

from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.errors import EmptyDatasetError
from edge_client.data.folder import load_folder
from edge_client.data.sources import load_dataset
from edge_client.joining import join_as
from edge_client.participant import JoinedRun, Participant
from edge_client.storage.identity import Identity
from edge_client.transport.client import Server
from protocol.messages import Results
from protocol.plan import RunPlan
from split_server.client import OperatorClient
from tests.e2e.conftest import data_dir_of
from tests.e2e.devices import DeviceThreads
from tests.e2e.test_cut import RecordingReporter, cut_run, take_part
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer
from tuning_methods.custom.settings import Custom


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    """All ten digits, six images of each, as files."""
    digits = load_dataset("digits").train
    for label in range(10):
        folder = tmp_path / "photos" / str(label)
        folder.mkdir(parents=True)
        for number in [i for i in range(len(digits)) if digits.label(i) == label][:6]:
            pixels = digits.image(number).transpose(1, 2, 0).copy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return load_folder(tmp_path / "photos", held_out=0.3, seed=0)


def test_a_device_continues_without_images_that_it_cannot_read(
    node: RunningServer, photos: Dataset, tmp_path: Path
) -> None:
    reporter = RecordingReporter()

    def damage_two_images(participant: JoinedRun) -> None:
        participant.data.train.store.paths[3].unlink()  # type: ignore[attr-defined]
        participant.data.test.store.paths[1].write_bytes(b"no image")  # type: ignore[attr-defined]

    settings = cut_run(wire={"keep_smashed": True}, keep_fraction=1.0)
    finished = take_part(
        node.url,
        OPERATOR,
        data_dir_of(node),
        settings,
        photos,
        tmp_path / "home",
        reporter,
        damage_two_images,
    )
    assert reporter.events.count("skipped") == 2
    assert [view.samples for view in finished.results.rounds] == [len(photos.train) - 1] * 2
    assert finished.results.rounds[-1].accuracy is not None


def test_a_device_that_joins_with_other_images_leaves_as_the_earlier_participant(
    node: RunningServer, tmp_path: Path
) -> None:
    digits = load_dataset("digits")
    with (
        contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator,
        contextlib.closing(Server(node.url)) as client,
    ):
        run = operator.create_run(Custom.of(cut_run()))
        for images in (40, 40, 30):
            data = limit_per_set(digits, train=images, test=10, seed=0)
            participant = Participant(client, data, tmp_path, "kitchen", RecordingReporter())
            with Identity(tmp_path / "identities", node.url, run.id, "kitchen") as identity:
                join_as(identity, participant, run.id, None)
        results: Results = operator.results(run.id)
    assert [(p.train_samples, p.left_at is None) for p in results.participants] == [
        (40, False),
        (30, True),
    ]


def test_a_device_whose_images_are_gone_says_so_and_the_others_go_on(
    node: RunningServer, photos: Dataset, tmp_path: Path
) -> None:
    class Removing(RecordingReporter):
        def event(self, kind: str, **data: object) -> None:
            if kind == "trained":
                shutil.rmtree(tmp_path / "photos")

    values = cut_run().model_dump()
    values["federation"] |= {"min_participants": 2}
    with contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator:
        run = operator.create_run(Custom.of(RunPlan.model_validate(values))).id
        other = DeviceThreads(node.url, run, 1, tmp_path, train=40, test=10)
        with contextlib.closing(Server(node.url)) as client:
            device = Participant(client, photos, tmp_path, "gone", Removing(), cache_bytes=0)
            joined = device.join(run, key="gone")
            with pytest.raises(EmptyDatasetError):
                joined.take_part()
        other.wait()  # far less than the ten minutes that a round may take
        results = operator.results(run)
        events = operator.events(run, 0, 0)
    assert [len(view.updated) for view in results.rounds] == [2, 1]
    [told] = [event.data["reason"] for event in events if event.kind == "participant_ended"]
    assert told == "its images cannot be used any more"
