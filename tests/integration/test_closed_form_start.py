"""Round 0 over HTTP: one classifier for every partition, exported as it was evaluated."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ImageSet
from edge_client.model import preprocessing_of
from edge_client.participant import JoinedRun, Participant, succeeded
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.errors import InvalidField, NotFound
from protocol.messages import Assignment, Results, RunStatus
from protocol.quality import EvaluationView
from protocol.settings import RunSettings
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.export import load_exported
from split_model.checkpoints.export_format import ExportFormat
from split_model.checkpoints.metadata import image_preparation
from split_model.linear_fit import Features
from split_model.parts.build import Layered, build_body, build_head
from split_server.federation.export import export_run, newest_state, read_round_state
from split_server.storage.run_files import RunFiles
from split_server.storage.tensor_files import read_tensors
from tests.support.edge import CLASSES, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer

TRAIN, TEST = image_set(18), image_set(6, seed=1)

PLAIN = {"smashed": "float32", "start": "float32", "features": "float32", "inference": "float32"}

R = TypeVar("R")


PROMPTED = {"prompt_count": 2}


def settings(
    devices: int, rounds: int = 0, method: dict[str, Any] = PROMPTED, **wire: str
) -> RunSettings:
    return RunSettings.model_validate(
        {
            "model": {
                "backbone": "vit_tiny_patch16_224",
                "weights": "random:0",
                "image_size": 32,
                "num_classes": len(CLASSES),
            },
            "method": {"name": "sfprompt", "rank": 16, **method},
            "federation": {"rounds": rounds, "min_participants": devices},
            "wire": {"updates": "float32", "head": "float32", **PLAIN, **wire},
        }
    )


def of_class(images: ImageSet, label: int) -> ImageSet:
    return images.subset(np.flatnonzero(images.labels == label))


def at_once(calls: Sequence[Callable[[], R]]) -> list[R]:
    """Call functions that wait for each other, each on a thread."""
    results: dict[int, R] = {}
    threads = [
        threading.Thread(target=lambda place=place, call=call: results.update({place: call()}))
        for place, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == len(calls), "a device has failed"
    return [results[place] for place in range(len(calls))]


def take_part(
    server: RunningServer, home: Path, run: str, name: str, data: Dataset
) -> Callable[[], bool]:
    def call() -> bool:
        with closing(Server(server.url)) as client:
            device = Participant(client, data, home / name, name, SilentReporter())
            return succeeded(device.join(run, f"join-{name}").take_part())

    return call


def run_with(
    server: RunningServer, home: Path, train: Sequence[ImageSet], **more: Any
) -> tuple[str, Results]:
    """Run with one device for each training set; the first also has the test images."""
    operator = server.operator()
    run = operator.create(settings(len(train), **more), key=uuid.uuid4().hex).id
    empty = TEST.subset(())
    parts = [Dataset(part, TEST if place == 0 else empty) for place, part in enumerate(train)]
    calls = [take_part(server, home, run, f"d{place}", data) for place, data in enumerate(parts)]
    assert all(at_once(calls))
    answer = operator.call("GET", f"/v1/runs/{run}/results")
    return run, Results.model_validate(answer.json())


def tail_of(data_dir: Path, run: str) -> tuple[Tensor, Tensor]:
    _, state = newest_state(data_dir, run)
    return state["tail.head.weight"], state["tail.head.bias"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def together(server: RunningServer, home: Path) -> tuple[str, Results]:
    """All data on one device."""
    return run_with(server, home, [TRAIN])


@pytest.fixture(scope="module")
def by_class(server: RunningServer, home: Path) -> tuple[str, Results]:
    """One class on each device."""
    return run_with(server, home, [of_class(TRAIN, label) for label in range(3)])


def read_numbers(data_dir: Path, run: str, images: ImageSet) -> Tensor:
    """What the tail reads, [n, q], from head and body with the run's prompts."""
    snapshot, state = newest_state(data_dir, run)
    plan = snapshot.plan.model
    weights = open_backbone(Path(snapshot.backbone_path))
    reader = BatchReader(images, preprocessing_of(plan, image_preparation(plan)))
    pixels, _ = read(reader, range(len(images)))
    with torch.no_grad():
        smashed = build_head(plan, Layered({}, weights))(pixels)
        return build_body(plan, weights)(smashed, state.get("prompts")).flatten(1)


def test_the_classifier_is_a_ridge_regression_on_principal_components(
    data_dir: Path, together: tuple[str, Results]
) -> None:
    run, _ = together
    numbers = read_numbers(data_dir, run, TRAIN).double().numpy()
    features = PCA(16).fit_transform(StandardScaler().fit_transform(numbers))
    weight, bias = tail_of(data_dir, run)
    scores = torch.from_numpy(numbers) @ weight.double().T + bias.double()
    targets = np.eye(3)[TRAIN.labels]
    # The calibration scales the scores, and cross-validation chooses the strength: find both.
    errors = []
    for strength in torch.logspace(-6, 6, 400).tolist():
        reference = Ridge(alpha=strength).fit(features, targets).predict(features)
        reference = torch.from_numpy(reference)
        scale = (scores * reference).sum() / reference.square().sum()
        errors.append(float((scores / scale - reference).abs().max()))
    assert min(errors) < 0.02


def test_one_class_a_device_gives_the_classifier_of_the_pooled_data(
    data_dir: Path, together: tuple[str, Results], by_class: tuple[str, Results]
) -> None:
    numbers = read_numbers(data_dir, together[0], TEST)
    logits = []
    for run, _ in (together, by_class):
        weight, bias = tail_of(data_dir, run)
        scores = numbers @ weight.T + bias
        logits.append(scores / scores.norm())  # calibrated on each device's own samples
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=0)
    assert together[1].rounds[0].accuracy == by_class[1].rounds[0].accuracy


def test_a_run_of_round_0_alone_finishes_with_an_evaluated_state(
    together: tuple[str, Results],
) -> None:
    (only,) = together[1].rounds
    assert together[1].run.status is RunStatus.FINISHED
    assert (only.round, only.samples, only.evaluation_samples) == (0, 18, 6)
    assert only.accuracy is not None
    assert only.accuracy >= 0.8
    assert only.train_loss is not None
    assert only.train_loss < torch.log(torch.tensor(3.0))


@pytest.mark.parametrize(
    "codecs", [{}, {"smashed": "klt:1", "inference_smashed": "float16", "start": "int4"}]
)
def test_the_exported_model_gives_the_evaluated_accuracy_and_loss(
    server: RunningServer, home: Path, data_dir: Path, tmp_path: Path, codecs: dict[str, str]
) -> None:
    run, results = run_with(server, home, [TRAIN], **codecs)
    export_run(data_dir, run, tmp_path / "model.safetensors")
    model = load_exported(tmp_path / "model.safetensors")
    reader = BatchReader(TEST, preprocessing_of(model.settings, model.preparation))
    images, labels = read(reader, range(len(TEST)))
    with torch.no_grad():
        logits = model(images)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    assert accuracy == results.rounds[-1].accuracy
    loss = F.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(results.rounds[-1].evaluation_loss, abs=1e-3)
    view = EvaluationView.model_validate(
        server.operator().call("GET", f"/v1/runs/{run}/rounds/0/evaluation").json()
    )
    pairs = Counter(zip(labels.tolist(), logits.argmax(dim=1).tolist(), strict=True))
    assert {(label, column): n for label, column, n in view.confusion} == pairs
    card = (tmp_path / "model.safetensors.md").read_text()
    assert f"{accuracy:.2%} on {len(TEST)} images that the devices held out" in card
    assert f"tuned on | {len(TRAIN)} images on 1 device " in card


def test_prompts_are_tuned_in_the_rounds_after_the_start_and_the_tail_is_not(
    server: RunningServer, data_dir: Path, home: Path
) -> None:
    run, results = run_with(server, home, [TRAIN], rounds=2)
    assert [view.round for view in results.rounds] == [0, 1, 2]
    files = RunFiles(data_dir / "runs" / run)
    states = [view.state for view in results.rounds]
    tails = [
        load["tail.head.weight"]
        for load in (read_tensors(files.state(state.sha256)) for state in states if state)
    ]
    torch.testing.assert_close(tails[0], tails[2])
    with pytest.raises(InvalidField, match="only of the newest round"):
        read_round_state(data_dir, run, "0")
    snapshot, state = newest_state(data_dir, run)
    start = newest_state(data_dir, run_with(server, home, [TRAIN])[0])[1]
    assert not torch.equal(state["prompts"], start["prompts"])
    assert snapshot.status is RunStatus.FINISHED


@dataclass(frozen=True)
class Refined:
    """A run with one class on each device, and three rounds that move the classifier."""

    run: str
    results: Results
    decays: list[float]


@pytest.fixture(scope="module")
def refined(server: RunningServer, home: Path) -> Refined:
    operator = server.operator()
    run = operator.create(settings(3, 3, method={}), key=uuid.uuid4().hex).id
    clients = [Server(server.url) for _ in range(3)]
    devices = [
        joined(client, home, run, f"refined{label}", Dataset(of_class(TRAIN, label), TEST))
        for label, client in enumerate(clients)
    ]
    ended = at_once([lambda device=device: device.take_part() for device in devices])
    assert all(succeeded(last) for last in ended)
    for client in clients:
        client.close()
    results = Results.model_validate(operator.call("GET", f"/v1/runs/{run}/results").json())
    return Refined(run, results, [each.samples.train.features.decay for each in devices])


def test_later_rounds_are_steps_of_penalised_logistic_regression(
    data_dir: Path, refined: Refined
) -> None:
    files = RunFiles(data_dir / "runs" / refined.run)
    basis = read_tensors(files.basis(0))
    views = refined.results.rounds
    states = [read_tensors(files.state(view.state.sha256)) for view in views if view.state]
    parts = [of_class(TRAIN, label) for label in range(3)]
    numbers = [read_numbers(data_dir, refined.run, part) for part in parts]
    features = [((each - basis["mean"]) @ basis["vectors"]).double() for each in numbers]
    mean = torch.cat(features).mean(dim=0)
    variances = (torch.cat(features) - mean).square().mean(dim=0)
    assert len(states) == 4
    assert all(decay > 0 for decay in refined.decays)
    for before, after in pairwise(states):
        weights, offsets = [], []  # of the devices
        for part, each, decay in zip(parts, features, refined.decays, strict=True):
            weight = before["tail.head.weight"].double().requires_grad_()
            # In terms of the centred features, so that the offset moves on its own.
            offset = (before["tail.head.bias"].double() + weight.detach() @ mean).requires_grad_()
            penalty = (decay / variances * weight.square()).sum() / 2
            loss = F.cross_entropy((each - mean) @ weight.T + offset, torch.from_numpy(part.labels))
            slopes = torch.autograd.grad(loss + penalty, [weight, offset])
            weights.append(weight.detach() - slopes[0] / (variances / 2 + decay / variances))
            offsets.append(offset.detach() - 2 * slopes[1])
        expected, offset = torch.stack(weights).mean(dim=0), torch.stack(offsets).mean(dim=0)
        torch.testing.assert_close(
            after["tail.head.weight"].double(), expected, atol=1e-3, rtol=1e-2
        )
        moved = after["tail.head.bias"].double() + expected @ mean
        torch.testing.assert_close(moved, offset, atol=1e-2, rtol=1e-2)


def test_later_rounds_send_and_tune_no_more_than_the_classifier(
    data_dir: Path, refined: Refined
) -> None:
    run, results = refined.run, refined.results
    assert results.run.plan.model.prompt_count == 0
    snapshot, state = newest_state(data_dir, run)
    assert set(state) == {"tail.head.weight", "tail.head.bias"}
    assert snapshot.state.server is None
    for view in results.rounds[1:]:
        assert not sum(view.traffic.get("smashed", {}).values())
        assert not sum(view.traffic.get("features", {}).values())


def test_each_round_can_be_exported_and_best_is_the_most_accurate(
    data_dir: Path, refined: Refined, tmp_path: Path
) -> None:
    measured = [(view.accuracy or 0.0, -view.round) for view in refined.results.rounds]
    best = read_round_state(data_dir, refined.run, "best")
    assert best.round == -max(measured)[1]
    first = read_round_state(data_dir, refined.run, "0")
    last = read_round_state(data_dir, refined.run, "3")
    assert (first.round, last.round) == (0, 3)
    _, newest = newest_state(data_dir, refined.run)
    assert torch.equal(last.tensors["tail.head.weight"], newest["tail.head.weight"])
    assert not torch.equal(first.tensors["tail.head.weight"], newest["tail.head.weight"])
    with pytest.raises(NotFound) as caught:
        read_round_state(data_dir, refined.run, "4")
    assert (caught.value.field, caught.value.value) == ("round", "4")
    out = tmp_path / "folder" / "model.onnx"
    export_run(data_dir, refined.run, out, ExportFormat.ONNX, "0")
    assert "session.run" in (out.parent / "model.onnx.md").read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.onnx", "model.onnx.md"]


def test_a_device_that_has_lost_its_features_gets_them_again(
    server: RunningServer, home: Path
) -> None:
    """Also one that has them in the basis of another attempt at round 0."""
    operator = server.operator()
    run = operator.create(settings(1, 2, method={}), key=uuid.uuid4().hex).id
    with closing(Server(server.url)) as client:
        device = joined(client, home, run, "forgetful", Dataset(TRAIN, TEST))
        cache, seen = device.samples.train.features, []
        request = device.samples.plane.start

        def forget(ids: Tensor, round_: int, attempt: int) -> Features:
            features = request(ids, round_, attempt)
            seen.append((round_, features.values))
            return features

        device.samples.plane.start = forget  # type: ignore[method-assign]
        train = device._train_until_complete

        def train_without(assignment: Assignment) -> None:
            if assignment.round == 1:
                cache.features = None
            elif assignment.round == 2:
                cache.attempt = 7
            train(assignment)

        device._train_until_complete = train_without  # type: ignore[method-assign]
        assert succeeded(device.take_part())
    assert [round_ for round_, _ in seen] == [0, 1, 2]
    for _, values in seen[1:]:
        torch.testing.assert_close(values, seen[0][1], atol=1e-5, rtol=1e-5)


def test_a_device_that_comes_too_late_for_round_0_declines_and_trains_in_the_next(
    server: RunningServer, home: Path
) -> None:
    values = settings(2, 1, method={}).model_dump()
    values["federation"] |= {"round_timeout_s": 8.0}
    run = server.operator().create(RunSettings.model_validate(values), key=uuid.uuid4().hex).id
    halves = [TRAIN.subset(range(9)), TRAIN.subset(range(9, 18))]
    clients = [Server(server.url) for _ in halves]
    devices = [
        joined(client, home, run, f"slow{place}", Dataset(half, TEST))
        for place, (client, half) in enumerate(zip(clients, halves, strict=True))
    ]
    train = devices[1]._train_round

    def train_late(assignment: Assignment) -> None:
        if assignment.round == 0:
            time.sleep(5)  # longer than half of the round's time
        train(assignment)

    devices[1]._train_round = train_late  # type: ignore[method-assign]
    ended = at_once([lambda device=device: device.take_part() for device in devices])
    assert all(succeeded(last) for last in ended)
    for client in clients:
        client.close()
    answer = server.operator().call("GET", f"/v1/runs/{run}/results")
    first, second = Results.model_validate(answer.json()).rounds
    assert (first.samples, second.samples) == (9, 18)
    assert first.closed_at is not None
    assert first.closed_at - first.opened_at < 8, "the round waited for the late device"


def test_sums_that_no_labels_give_end_a_devices_part_in_round_0_and_the_others_go_on(
    server: RunningServer, home: Path, request: pytest.FixtureRequest
) -> None:
    operator = server.operator()
    run = operator.create(settings(2, method={}), key=uuid.uuid4().hex).id
    halves = [TRAIN.subset(range(9)), TRAIN.subset(range(9, 18))]
    clients = [Server(server.url) for _ in halves]
    for client in clients:
        request.addfinalizer(client.close)
    honest, liar = (
        joined(client, home, run, f"liar{place}", Dataset(half, held_out))
        for place, (client, half, held_out) in enumerate(
            zip(clients, halves, (TEST, TEST.subset(())), strict=True)
        )
    )
    solve = liar.samples.plane.solve

    def lie(sums: Tensor, *rest: Any) -> Any:
        return solve(20 * sums, *rest)

    liar.samples.plane.solve = lie  # type: ignore[method-assign]

    def try_to_lie() -> object:
        with pytest.raises(InvalidField, match="add up to the features"):
            liar.take_part()
        return None

    at_once([honest.take_part, try_to_lie])
    answer = operator.call("GET", f"/v1/runs/{run}/results")
    (only,) = Results.model_validate(answer.json()).rounds
    assert (only.samples, only.refused) == (9, ("p0002",))
    assert only.closed_at is not None
    assert only.closed_at - only.opened_at < 60, "the round waited for the liar"


def joined(client: Server, home: Path, run: str, name: str, data: Dataset) -> JoinedRun:
    return Participant(client, data, home / name, name, SilentReporter()).join(run, f"join-{name}")


def test_a_device_gets_the_same_classifier_after_the_server_has_lost_its_features(
    server: RunningServer, home: Path, request: pytest.FixtureRequest
) -> None:
    """Another device's update may be counted already: the start must not be computed again."""
    run = server.operator().create(settings(2), key=uuid.uuid4().hex).id
    empty = TEST.subset(())
    halves = [TRAIN.subset(range(9)), TRAIN.subset(range(9, 18))]
    clients = [Server(server.url) for _ in halves]
    for client in clients:
        request.addfinalizer(client.close)
    devices = [
        joined(client, home, run, f"half{place}", Dataset(half, empty))
        for place, (client, half) in enumerate(zip(clients, halves, strict=True))
    ]

    def features_of(device: JoinedRun) -> Tensor:
        samples = device.samples.train
        assert samples.uploader is not None
        positions = np.arange(len(samples))
        samples.uploader.ensure(positions)
        return device.samples.plane.start(samples.uploader.ids(positions), 0, 0).values

    def solve(device: JoinedRun, features: Tensor) -> Tensor:
        labels = device.samples.train.images.image_set.labels
        one_hot = np.eye(3, dtype=np.float32)[labels]
        plane = device.samples.plane
        return plane.solve(one_hot.T @ features, one_hot.sum(axis=0), 0, len(labels)).weight

    features = at_once([lambda device=device: features_of(device) for device in devices])
    pairs = list(zip(devices, features, strict=True))
    first, second = at_once([lambda pair=pair: solve(*pair) for pair in pairs])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    services = server.server._application.services
    assert services is not None
    services.starts.release(run)
    again = features_of(devices[1])
    torch.testing.assert_close(again, features[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(solve(devices[1], again), first, rtol=0, atol=0)
