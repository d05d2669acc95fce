"""Runs of Fed3R over HTTP: the exact classifier, refused sums, bytes."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.participant import JoinedRun, Participant
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.errors import InvalidField
from protocol.messages import RunStatus, RunView, parse_message
from protocol.settings import RunSettings
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.state import device_shapes
from split_server.federation.export import newest_state
from tests.support.edge import files, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer, code_of, joined, running_server
from tuning_methods.fed3r.sums import CLASSES, GRAM, sums_shapes

WIDTH, NUM_CLASSES, TEN = 64, 3, 10

MODEL = {
    "backbone": "test_vit",
    "weights": "random:0",
    "image_size": 32,
}

_keys = itertools.count()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[RunningServer]:
    with running_server(data_dir) as running:
        yield running


def settings(
    method: dict[str, Any] | None = None, num_classes: int = NUM_CLASSES, **federation: Any
) -> RunSettings:
    return parse_message(
        RunSettings,
        {
            "method": {"name": "fed3r", **(method or {})},
            "model": {**MODEL, "num_classes": num_classes},
            "federation": {"rounds": 1, **federation},
        },
    )


def create(server: RunningServer, run: RunSettings) -> RunView:
    return server.operator().create(run, key=f"fed3r-{next(_keys)}")


def subset(images: ImageSet, positions: np.ndarray) -> ImageSet:
    pixels = np.stack([images.image(int(position)) for position in positions])
    return ImageSet(ArrayStore(pixels), images.labels[positions], images.class_names)


def test_devices_with_one_class_each_give_ridge_regression_on_pooled_features(
    server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    run = create(server, settings({"strength": 0.1}, min_participants=NUM_CLASSES))
    images = image_set(25)
    devices: list[JoinedRun] = []
    ends: list[RunStatus] = []
    with contextlib.ExitStack() as stack:
        for label in range(NUM_CLASSES):
            name = f"device-{label}"
            client = stack.enter_context(contextlib.closing(Server(server.url)))
            data = Dataset(subset(images, np.flatnonzero(images.labels == label)), image_set(6))
            device = Participant(client, data, tmp_path / name, name, SilentReporter())
            devices.append(device.join(run.id, key=f"join-{name}"))

        def take_part(device: JoinedRun) -> None:
            ends.append(device.take_part().status)

        threads = [threading.Thread(target=take_part, args=(d,)) for d in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent = client.traffic().to_dict()["updates"]["up"]
    assert ends == [RunStatus.FINISHED] * NUM_CLASSES

    plan = run.plan.model
    whole = timm.create_model(plan.backbone, img_size=32, num_classes=NUM_CLASSES).eval()
    whole.load_state_dict(dict(open_backbone(files(plan).backbone)), strict=False)
    pixels, labels = read(BatchReader(images, devices[0].model.preprocessing), range(len(images)))
    with torch.no_grad():
        features = whole.forward_head(whole.forward_features(pixels), pre_logits=True).double()
    squares = float((features - features.mean(dim=0)).square().sum() / len(features))
    reference = Ridge(alpha=0.1 * squares)
    reference.fit(features.numpy(), F.one_hot(labels).double().numpy())
    _, state = newest_state(data_dir, run.id)
    assert state.keys() == device_shapes(plan).keys()
    for name, expected in (("weight", reference.coef_), ("bias", reference.intercept_)):
        result = state[f"tail.head.{name}"].double().numpy()
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)

    # A device sends its sums and the classifier: 4 bytes a number, and headers.
    numbers = (WIDTH + 1) * (WIDTH + 2) // 2 + 2 * (WIDTH + 1) * NUM_CLASSES
    assert 4 * numbers <= sent <= 4 * numbers + 4096
    traffic = server.operator().call("GET", f"/v1/runs/{run.id}/results").json()["traffic"]
    assert not {"smashed", "features", "gradients"} & traffic.keys()


def update(**changes: Tensor | None) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "tail.head.weight": (TEN, WIDTH),
        "tail.head.bias": (TEN,),
        **sums_shapes(WIDTH, TEN),
    }
    tensors: dict[str, Tensor | None] = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return {name: value for name, value in (tensors | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({GRAM: None}, "wrong_shape"),
        ({CLASSES: None}, "wrong_shape"),
        ({GRAM: torch.zeros(WIDTH + 1, WIDTH + 1)}, "wrong_shape"),
        ({CLASSES: torch.full((WIDTH + 1, TEN), torch.nan)}, "non_finite"),
        ({CLASSES: torch.full((WIDTH + 1, TEN), 1.5)}, "invalid_field"),
        ({"third": torch.zeros(1)}, "wrong_shape"),
    ],
)
def test_wrong_sums_are_refused(
    server: RunningServer, changes: dict[str, Tensor | None], code: str
) -> None:
    run = create(server, settings(num_classes=TEN))
    device = joined(server, run.id)
    assert code_of(device.update(run.id, update(**changes), "one")) == code


@pytest.mark.parametrize(
    ("federation", "field"),
    [
        ({"rounds": 2}, "federation.rounds must be 1"),
        ({"server_optimizer": "fedavgm"}, "federation.server_optimizer must be fedavg"),
        ({"dp_clip": 1.0}, "federation.dp_clip must be none"),
    ],
)
def test_settings_without_a_closed_form_are_refused(federation: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        settings(**federation)


def test_a_backbone_with_two_classifiers_is_refused(server: RunningServer) -> None:
    values = settings().model_dump(mode="json")
    values["model"]["backbone"] = "deit_tiny_distilled_patch16_224"
    answer = server.operator().call("POST", "/v1/runs", key="two", json=values)
    assert code_of(answer) == "invalid_field"
    assert answer.json()["error"]["field"] == "model.backbone"
