"""SplitFed with a tuned body over HTTP, against timm's own model in one process."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data import BatchReader, Dataset, shuffled
from edge_client.participant import Participant
from edge_client.transport import Server
from protocol.messages import Results, RunStatus, RunView
from protocol.seeds import derive_seed
from protocol.settings import BackboneSettings, FederationSettings, RunSettings, TrainingSettings
from split_model import load_exported, load_state, open_backbone
from split_model.libraries import timm
from split_server.exporting import export_run, newest_state
from split_server.states import StateRefs
from tests.edge_doubles import files, image_set
from tests.http_doubles import Running, running_server

MODEL = BackboneSettings(
    backbone="vit_tiny_patch16_224",
    weights="random:0",
    image_size=32,
    cut=3,
    num_classes=3,
    prompt_count=0,
    tune="full",
    tune_body=True,
)
SAMPLES, BATCH, ROUNDS, EPOCHS, RATE, DECAY = 10, 4, 2, 2, 0.02, 1e-4
MODES = {"graphs": "auto", "recomputed": "recompute"}
_keys = itertools.count()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[Running]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with running_server(data_dir) as running:
        yield running
    torch.set_num_threads(before)


def created(server: Running, devices: int = 1, rounds: int = ROUNDS, **parts: Any) -> RunView:
    training = {
        "local_epochs": 0,
        "split_epochs": EPOCHS,
        "keep_fraction": 1,
        "batch_size": BATCH,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": DECAY,
        "tail_learning_rate": RATE,
        "schedule": "constant",
    }
    settings = RunSettings(
        seed=3,
        model=MODEL.model_copy(update=parts.get("model", {})),
        federation=FederationSettings(
            rounds=rounds, min_participants=devices, **parts.get("federation", {})
        ),
        training=TrainingSettings.model_validate(training | parts.get("training", {})),
        wire=parts.get("wire", {}),
    )
    return server.operator().create(settings, key=f"body-{next(_keys)}")


def two_sets(seed: int = 0) -> Dataset:
    return Dataset(image_set(SAMPLES, seed=seed), image_set(7, seed=1))


class Device:
    """A whole run of one device, and its state after each step."""

    def __init__(
        self, server: Running, folder: Path, run: RunView, data: Dataset, name: str = "only"
    ) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.events: list[str] = []
        with contextlib.closing(Server(server.url)) as client:
            self.participant = Participant(client, data, folder / name, name, self)
            self.participant.join(run.id, key=f"join-{name}")
            self.initial = load_state(self.participant.files.fetch(run.state, lambda _: b""))
            self.last = self.participant.take_part()
            self.traffic = client.traffic().to_dict()

    def event(self, kind: str, **data: Any) -> None:
        self.events.append(kind)

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase == "split":
            self.states.append(self.participant.model.state())

    def close(self) -> None:
        pass


class Uncut:
    """timm's own model, all of it trained."""

    def __init__(self, initial: dict[str, Tensor]) -> None:
        self.model = timm.create_model(MODEL.backbone, img_size=32, num_classes=3).eval()
        weights = dict(open_backbone(files(MODEL).backbone))
        weights |= {name: initial["tail." + name] for name in ("head.weight", "head.bias")}
        self.model.load_state_dict(weights)

    def train(self, samples: BatchReader, name: str, round_: int) -> Iterator[None]:
        """One round's steps; its momentum begins anew."""
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY
        )
        seed = derive_seed(3, "split", name, round_)
        for epoch in range(EPOCHS):
            for positions in shuffled(len(samples), BATCH, seed, epoch):
                images, labels = samples.read(positions)
                optimizer.zero_grad()
                F.cross_entropy(self.model(images), labels).backward()
                optimizer.step()
                yield

    def state(self) -> dict[str, Tensor]:
        """By the names of a run's state: which part a block belongs to follows from its number."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            part = "tail" if name.split(".")[0] in ("norm", "head") else "head"
            if name.startswith("blocks.") and int(name.split(".")[1]) >= MODEL.cut:
                part = "body"
            found[f"{part}.{name}"] = tensor.clone()
        return found


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


def state_after(data_dir: Path, server: Running, run: RunView, round_: int) -> dict[str, Tensor]:
    """The device's part of the global state that a round made."""
    answer = server.operator().call("GET", f"/v1/runs/{run.id}/results")
    made = Results.model_validate(answer.json()).rounds[round_ - 1].state
    assert made is not None
    return load_state(data_dir / "runs" / run.id / "states" / f"{made.sha256}.safetensors")


@pytest.mark.parametrize("pooled", [False, True])
def test_one_device_trains_head_body_and_tail_as_the_uncut_model_step_by_step(
    server: Running, data_dir: Path, tmp_path: Path, pooled: bool
) -> None:
    run = created(server, wire={"pooled_features": pooled})
    device = Device(server, tmp_path, run, two_sets())
    assert device.last.status is RunStatus.FINISHED
    assert "begun-anew" not in device.events
    samples = BatchReader(image_set(SAMPLES), device.participant.model.preprocessing)
    uncut, step = Uncut(device.initial), 0
    first = uncut.state()
    for round_ in range(1, ROUNDS + 1):
        for _ in uncut.train(samples, "only", round_):
            require_equal(device.states[step], uncut.state())
            step += 1
        require_equal(state_after(data_dir, server, run, round_), uncut.state())
    assert step == len(device.states) == ROUNDS * EPOCHS * 3
    _, final = newest_state(data_dir, run.id)
    assert final.keys() == first.keys(), "the whole model is tuned"
    require_equal(final, uncut.state())
    for name, value in final.items():
        assert not torch.equal(value, first[name]), f"{name} stands still"

    # The server's own measurement, the export and the uncut model say the same.
    images, labels = BatchReader(image_set(7, seed=1), samples.preprocessing).read(range(7))
    with torch.no_grad():
        logits = uncut.model(images)
    export_run(data_dir, run.id, tmp_path / "model.safetensors")
    exported = load_exported(tmp_path / "model.safetensors")(images)
    torch.testing.assert_close(exported, logits, rtol=0, atol=1e-4)
    answer = server.operator().call("GET", f"/v1/runs/{run.id}/results")
    measured = Results.model_validate(answer.json()).rounds[-1]
    assert measured.accuracy == int((logits.argmax(1) == labels).sum()) / 7
    expected = F.cross_entropy(logits, labels).item()
    assert measured.evaluation_loss == pytest.approx(expected, abs=1e-4)
