"""Runs with shared labels over HTTP: the devices upload and leave, and the server does the rest."""

from __future__ import annotations

import time
import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ImageSet
from edge_client.model import preprocessing_of
from edge_client.participant import JoinedRun, Participant, succeeded
from edge_client.transport.client import Server
from protocol.errors import InvalidField
from protocol.messages import JoinRequest, Results, RunStatus, Task
from protocol.settings import RunSettings
from split_model.checkpoints.export import load_exported
from split_server.federation.export import export_run, newest_state
from split_server.storage.run_files import RunFiles
from tests.integration.test_closed_form_start import at_once, settings, take_part
from tests.support.edge import CLASSES, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer, code_of, running_server, wait_until


def confused(images: ImageSet) -> ImageSet:
    """The images with some wrong labels, so that no classifier is perfect."""
    labels = images.labels.copy()
    labels[:4] = (labels[:4] + 1) % len(CLASSES)
    return replace(images, labels=labels)


PARTS = (confused(image_set(13)), confused(image_set(9, seed=2)))
TESTS = (confused(image_set(6, seed=1)), image_set(5, seed=3))
DATA = [Dataset(train, test) for train, test in zip(PARTS, TESTS, strict=True)]


def run_settings(labels: str, rounds: int = 3, **federation: Any) -> RunSettings:
    plain = settings(2, rounds=rounds, method={"rank": 16})
    values = plain.model_dump(mode="json")
    values["training"]["labels"] = labels
    values["federation"] |= {"patience": 0, **federation}
    values["method"]["cut"] = 1
    return RunSettings.model_validate(values)


def create(server: RunningServer, labels: str, **more: Any) -> str:
    return server.operator().create(run_settings(labels, **more), key=uuid.uuid4().hex).id


def join(client: Server, home: Path, run: str, place: int, *, shares: bool = True) -> JoinedRun:
    name = f"d{place}"
    device = Participant(
        client, DATA[place], home / name, name, SilentReporter(), shares_labels=shares
    )
    return device.join(run, f"join-{name}")


def upload(server: RunningServer, home: Path, run: str, place: int) -> JoinedRun:
    """Join, upload and go away."""
    with closing(Server(server.url)) as client:
        joined = join(client, home, run, place)
        joined.upload()
        assert client.assignment(run, None, 0).task is not Task.UPLOAD
        return joined


def results_of(server: RunningServer, run: str) -> Results:
    return Results.model_validate(server.operator().call("GET", f"/v1/runs/{run}/results").json())


def finished(server: RunningServer, run: str) -> Results:
    for _ in range(600):
        results = results_of(server, run)
        if results.run.status.is_over:
            return results
        time.sleep(0.05)
    raise AssertionError(f"the run does not end: {results.rounds}")


def tail_of(data_dir: Path, run: str) -> Tensor:
    _, state = newest_state(data_dir, run)
    return torch.cat([state["tail.head.weight"].flatten(), state["tail.head.bias"]])


def test_the_server_alone_reaches_the_state_of_a_run_with_its_devices(
    server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    run = create(server, "device")
    calls = [take_part(server, tmp_path, run, f"d{place}", data) for place, data in enumerate(DATA)]
    assert all(at_once(calls))
    expected = results_of(server, run)

    shared = create(server, "shared")
    for place in range(2):  # one after the other: the first is away when the second joins
        upload(server, tmp_path, shared, place)
    results = finished(server, shared)

    assert results.run.status is RunStatus.FINISHED
    assert [view.round for view in results.rounds] == [0, 1, 2, 3]
    reference, tail = tail_of(data_dir, run), tail_of(data_dir, shared)
    # Later rounds read the features as float16.
    assert float((tail - reference).norm() / reference.norm()) < 2e-3
    for mine, its in zip(results.rounds, expected.rounds, strict=True):
        assert (mine.samples, mine.evaluation_samples) == (its.samples, its.evaluation_samples)
        assert mine.accuracy == its.accuracy
        assert mine.evaluation_loss == pytest.approx(its.evaluation_loss, rel=2e-3)
    assert len({view.evaluation_loss for view in results.rounds}) > 1, "a step moves the classifier"


def test_a_device_that_does_not_share_is_refused_and_sends_no_label(
    server: RunningServer, tmp_path: Path
) -> None:
    run = create(server, "shared")
    with closing(Server(server.url)) as client:
        with pytest.raises(InvalidField, match="may not") as refused:
            join(client, tmp_path, run, 0, shares=False)
        assert (refused.value.field, refused.value.hint) == (
            "shares_labels",
            "if the server may have your labels: edge-client join --share-labels",
        )
        # A server that lets it join all the same learns nothing.
        request = JoinRequest(
            name="d0", train_samples=13, test_samples=6, num_classes=3, shares_labels=True
        )
        response = client.join(run, request, "as-if")
        client.authenticate(response.credential)
        device = Participant(client, DATA[0], tmp_path / "x", "d0", SilentReporter())
        joined = join(client, tmp_path, run, 1)
        model, memory = joined._run_model, joined._memory
        stubborn = JoinedRun(device, joined.id, joined.credential, model, memory)
        with pytest.raises(InvalidField, match="asks for labels"):
            stubborn.upload()
    assert results_of(server, run).rounds == ()


def test_faulty_frames_of_labels_are_refused(server: RunningServer, tmp_path: Path) -> None:
    run = create(server, "shared")
    with closing(Server(server.url)) as client:
        joined = join(client, tmp_path, run, 0)
        joined.samples.train.uploader.ensure(np.arange(13))  # type: ignore[union-attr]
        found = joined.samples.train.uploader.ids(np.arange(13))  # type: ignore[union-attr]
        ids = torch.tensor(found)
    api = server.api(joined.credential)
    labels = torch.from_numpy(PARTS[0].labels)

    def refused(**tensors: Tensor) -> tuple[str, str]:
        answer = api.ask("labels", {}, **tensors)
        return code_of(answer), answer.json()["error"]["field"]

    assert refused(train_ids=ids) == ("malformed_frame", "tensors")
    assert refused(train_ids=ids, train_labels=labels[:5]) == ("wrong_shape", "train_labels")
    assert refused(train_ids=ids, train_labels=labels + 1) == ("invalid_field", "train_labels")
    assert refused(train_ids=ids, train_labels=labels - 1) == ("invalid_field", "train_labels")
    twice, both = torch.cat([ids, ids]), torch.cat([labels, labels])
    assert refused(train_ids=twice, train_labels=both) == ("invalid_field", "train_ids")
    unknown = api.ask("labels", {}, train_ids=ids.flip(1), train_labels=labels)
    assert unknown.is_success
    assert api.assignment(run).task is Task.UPLOAD, "samples that the server lacks have no label"
    assert api.ask("labels", {}, train_ids=ids, train_labels=labels).is_success
    assert api.assignment(run).task is Task.WAIT
    other = api.ask("labels", {}, train_ids=ids, train_labels=(labels + 1) % 3)
    assert code_of(other) == "conflict"
    own = api.update(run, {"tail.head.bias": torch.zeros(3)}, "own", round=0)
    assert code_of(own) == "invalid_field"


@pytest.mark.parametrize("samples_only", [False, True])
def test_a_device_takes_its_samples_and_labels_away(
    server: RunningServer, data_dir: Path, tmp_path: Path, samples_only: bool
) -> None:
    run = create(server, "shared", rounds=2)
    first = upload(server, tmp_path, run, 0)
    files = RunFiles(data_dir / "runs" / run)
    assert files.labels(first.id).is_file()
    with closing(Server(server.url)) as client:
        client.authenticate(first.credential)
        if samples_only:
            client.forget_samples(run)
        else:
            client.leave(run)
    assert not files.labels(first.id).is_file()
    second = upload(server, tmp_path, run, 1)
    time.sleep(0.3)
    assert results_of(server, run).rounds == (), "it would need two devices with labels"
    if samples_only:
        upload(server, tmp_path, run, 0)
        assert {p for view in finished(server, run).rounds for p in view.updated} == {
            first.id,
            second.id,
        }
        assert not files.labels(second.id).is_file(), "a run that is over keeps no labels"


def test_a_device_may_stay_until_the_run_ends(server: RunningServer, tmp_path: Path) -> None:
    run = create(server, "shared", rounds=1)
    upload(server, tmp_path, run, 0)
    with closing(Server(server.url)) as client:
        assert succeeded(join(client, tmp_path, run, 1).take_part())


def test_a_restarted_server_needs_no_device_after_round_0(tmp_path: Path) -> None:
    node = tmp_path / "node"
    with running_server(node) as before:
        run = create(before, "shared", rounds=400)
        for place in range(2):
            upload(before, tmp_path, run, place)
        wait_until(lambda: len(results_of(before, run).rounds) > 2, 60)
    with running_server(node) as after:
        seen = len(results_of(after, run).rounds)
        assert seen < 400, "the run was over before the restart"
        wait_until(lambda: len(results_of(after, run).rounds) > seen + 2, 60)


def tuned_settings(**method: Any) -> RunSettings:
    values = run_settings("shared", rounds=1).model_dump(mode="json")
    values["method"] |= {"server_tuning": "lora", "server_epochs": 8} | method
    values["training"]["batch_size"] = 4
    values["wire"]["inference_smashed"] = "float32"
    return RunSettings.model_validate(values)


@pytest.mark.parametrize("rate", [2e-3, 1e-12])
def test_a_body_tuned_on_the_server_is_kept_if_it_helps_and_exported_as_measured(
    server: RunningServer, data_dir: Path, tmp_path: Path, rate: float
) -> None:
    settings = tuned_settings(server_learning_rate=rate)
    run = server.operator().create(settings, key=uuid.uuid4().hex).id
    for place in range(2):
        upload(server, tmp_path, run, place)
    results = finished(server, run)
    events = server.operator().call("GET", f"/v1/runs/{run}/events").json()
    kinds = [event["kind"] for event in events]
    (tuned,) = [event["data"] for event in events if event["kind"] == "body_tuned"]
    assert kinds.index("body_tuned") < kinds.index("round_opened")
    is_better = (
        tuned["loss_after"] < tuned["loss_before"]
        and tuned["correct_after"] >= tuned["correct_before"]
    )
    assert tuned["kept"] is is_better
    export_run(data_dir, run, tmp_path / "model.safetensors")
    model = load_exported(tmp_path / "model.safetensors")
    assert bool((data_dir / "runs" / run / "weights").exists()) is is_better
    correct = 0
    for images in TESTS:
        reader = BatchReader(images, preprocessing_of(model.settings, model.preparation))
        pixels, labels = (torch.from_numpy(each) for each in reader.read(np.arange(len(images))))
        with torch.no_grad():
            correct += int((model(pixels).argmax(dim=1) == labels).sum())
    assert results.rounds[-1].accuracy == correct / sum(map(len, TESTS))
    if rate < 1e-6:
        assert not is_better, "nothing was tuned, so nothing is kept"
