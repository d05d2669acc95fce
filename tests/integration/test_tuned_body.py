"""SplitFed with a tuned body over HTTP, compared with timm's model in one process."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import BatchReader, shuffled
from edge_client.data.dataset import Dataset
from edge_client.participant import Participant
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.federation import FederationSettings
from protocol.messages import Results, RunStatus, RunView
from protocol.plan import ModelPlan, RunPlan, TrainingPlan
from protocol.seeds import derive_seed
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.export import load_exported
from split_model.checkpoints.state import load_state
from split_server.federation.export import export_run, newest_state
from tests.support.edge import files, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer, code_of, running_server, tensor_in
from tests.support.settings import custom_settings

MODEL = ModelPlan(
    backbone="test_vit",
    weights="random:0",
    image_size=32,
    cut=3,
    num_classes=3,
    prompt_count=0,
    tune="full",
    tune_body=True,
)

SAMPLES, BATCH, ROUNDS, EPOCHS, RATE, DECAY = 10, 4, 2, 2, 0.02, 1e-4

_keys = itertools.count()


def create_run(
    server: RunningServer, devices: int = 1, rounds: int = ROUNDS, **parts: Any
) -> RunView:
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
    settings = RunPlan(
        seed=3,
        model=MODEL.model_copy(update=parts.get("model", {})),
        federation=FederationSettings(
            rounds=rounds, min_participants=devices, **parts.get("federation", {})
        ),
        training=TrainingPlan.model_validate(training | parts.get("training", {})),
        wire=parts.get("wire", {}),
    )
    return server.operator().create(settings, key=f"body-{next(_keys)}")


def two_sets(seed: int = 0) -> Dataset:
    return Dataset(image_set(SAMPLES, seed=seed), image_set(7, seed=1))


class Device(SilentReporter):
    """Takes part in a whole run, and records its state after each step."""

    def __init__(
        self, server: RunningServer, folder: Path, run: RunView, data: Dataset, name: str = "only"
    ) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.events: list[str] = []
        with contextlib.closing(Server(server.url)) as client:
            device = Participant(client, data, folder / name, name, self)
            self.participant = device.join(run.id, key=f"join-{name}")
            self.initial = load_state(self.participant.files.fetch(run.state, lambda _: b""))
            self.last = self.participant.take_part()
            self.traffic = client.traffic().to_dict()

    def event(self, kind: str, **data: Any) -> None:
        self.events.append(kind)

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase == "split":
            self.states.append(self.participant.model.state())


class Uncut:
    """timm's model, with all parameters trained."""

    def __init__(self, initial: dict[str, Tensor]) -> None:
        self.model = timm.create_model(MODEL.backbone, img_size=32, num_classes=3).eval()
        weights = dict(open_backbone(files(MODEL).backbone))
        weights |= {name: initial["tail." + name] for name in ("head.weight", "head.bias")}
        self.model.load_state_dict(weights)

    def train(self, samples: BatchReader, name: str, round_: int) -> Iterator[None]:
        """Run one round's steps; momentum starts at zero in each round."""
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY
        )
        seed = derive_seed(3, "split", name, round_)
        for epoch in range(EPOCHS):
            for positions in shuffled(len(samples), BATCH, seed, epoch):
                images, labels = read(samples, positions)
                optimizer.zero_grad()
                F.cross_entropy(self.model(images), labels).backward()
                optimizer.step()
                yield

    def state(self) -> dict[str, Tensor]:
        """The parameters by their names in a run's state."""
        result = {}
        for name, tensor in self.model.state_dict().items():
            part = "tail" if name.split(".")[0] in ("norm", "head") else "head"
            if name.startswith("blocks.") and int(name.split(".")[1]) >= MODEL.cut:
                part = "body"
            result[f"{part}.{name}"] = tensor.clone()
        return result


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


def state_after(
    data_dir: Path, server: RunningServer, run: RunView, round_: int
) -> dict[str, Tensor]:
    """The device's part of the global state after a round."""
    response = server.operator().call("GET", f"/v1/runs/{run.id}/results")
    reference = Results.model_validate(response.json()).rounds[round_ - 1].state
    assert reference is not None
    return load_state(data_dir / "runs" / run.id / "states" / f"{reference.sha256}.safetensors")


@pytest.mark.parametrize("pooled", [False, True])
def test_one_device_trains_head_body_and_tail_as_the_uncut_model_in_each_step(
    server: RunningServer, data_dir: Path, tmp_path: Path, pooled: bool
) -> None:
    run = create_run(server, wire={"pooled_features": pooled})
    device = Device(server, tmp_path, run, two_sets())
    assert device.last.status is RunStatus.FINISHED
    assert "begun-anew" not in device.events
    samples = BatchReader(image_set(SAMPLES), device.participant.model.preprocessing)
    uncut, step = Uncut(device.initial), 0
    initial = uncut.state()
    for round_ in range(1, ROUNDS + 1):
        for _ in uncut.train(samples, "only", round_):
            assert_close(device.states[step], uncut.state())
            step += 1
        assert_close(state_after(data_dir, server, run, round_), uncut.state())
    assert step == len(device.states) == ROUNDS * EPOCHS * 3
    _, final = newest_state(data_dir, run.id)
    assert final.keys() == initial.keys(), "the whole model is tuned"
    updates = device.traffic["updates"]
    sent = 4 * sum(tensor.numel() for tensor in device.initial.values())
    assert not any(name.startswith("body.") for name in device.initial)
    assert updates["up"] < ROUNDS * sent + 100_000, "an update does not contain the body"
    assert updates["down"] < (ROUNDS + 1) * sent + 100_000, "nor does a download"
    assert_close(final, uncut.state())
    for name, value in final.items():
        assert not torch.equal(value, initial[name]), f"{name} has not changed"

    # The server's evaluation, the exported model and the uncut model agree.
    images, labels = read(BatchReader(image_set(7, seed=1), samples.preprocessing), range(7))
    with torch.no_grad():
        logits = uncut.model(images)
    export_run(data_dir, run.id, tmp_path / "model.safetensors")
    exported = load_exported(tmp_path / "model.safetensors")(images)
    torch.testing.assert_close(exported, logits, rtol=0, atol=1e-4)
    response = server.operator().call("GET", f"/v1/runs/{run.id}/results")
    measured = Results.model_validate(response.json()).rounds[-1]
    assert measured.accuracy == int((logits.argmax(1) == labels).sum()) / 7
    expected = F.cross_entropy(logits, labels).item()
    assert measured.evaluation_loss == pytest.approx(expected, abs=1e-4)


def test_the_bodies_of_two_devices_are_averaged_by_their_samples(
    server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    """With 10 and 4 samples the weights are 5/7 and 2/7, in both rounds."""
    run = create_run(server, devices=2, wire={"update_deltas": True})
    sets = {
        "a": Dataset(image_set(10, seed=5), image_set(3, seed=1)),
        "b": Dataset(image_set(4, seed=6), image_set(3, seed=2)),
    }
    devices: dict[str, Device] = {}

    def take_part(name: str) -> None:
        devices[name] = Device(server, tmp_path, run, sets[name], name)

    threads = [threading.Thread(target=take_part, args=(name,)) for name in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert devices.keys() == sets.keys()
    averaged = Uncut(devices["a"].initial)
    for round_ in range(1, ROUNDS + 1):
        initial, trained = averaged.model.state_dict(), {}
        for name, data in sets.items():
            preprocessing = devices[name].participant.model.preprocessing
            local = Uncut(devices["a"].initial)
            local.model.load_state_dict(initial)
            for _ in local.train(BatchReader(data.train, preprocessing), name, round_):
                pass
            trained[name] = local.model.state_dict()
        mean = {n: (5 * trained["a"][n] + 2 * trained["b"][n]) / 7 for n in initial}
        averaged.model.load_state_dict(mean)
    finished, final = newest_state(data_dir, run.id)
    assert finished.status is RunStatus.FINISHED
    assert_close(final, averaged.state())
    assert any(name.startswith("body.") for name in final)


def test_a_body_that_does_not_fit_in_memory_waits_until_another_is_released(tmp_path: Path) -> None:
    """Nine blocks of ViT-Ti with momentum take 48 MiB; two such bodies do not fit in 64 MiB."""
    larger = {"backbone": "vit_tiny_patch16_224"}
    with running_server(tmp_path / "node", engine_memory_mib=64) as server:
        run = create_run(server, devices=2, rounds=1, model=larger)
        devices: list[Device] = []

        def take_part(name: str) -> None:
            devices.append(Device(server, tmp_path, run, two_sets(), name))

        threads = [threading.Thread(target=take_part, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [device.last.status for device in devices] == [RunStatus.FINISHED] * 2
        assert not any("begun-anew" in device.events for device in devices)
        metrics = server.operator().call("GET", "/metrics").text
    refused = [line for line in metrics.splitlines() if 'refused_total{code="busy"}' in line]
    assert float(refused[0].split()[-1]) > 0
    assert "sfprompt_engine_own_bodies 0.0" in metrics


TOKENS, WIDTH = 1 + 4, 64


def meta(number: int, steps: int = 2, round_: int = 1, **extra: Any) -> dict[str, Any]:
    fields = {"session": "s", "round": round_, "attempt": 0, "number": number, "steps": steps}
    return fields | extra


def random_batch(seed: int) -> Tensor:
    """[B, T, D]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((BATCH, TOKENS, WIDTH), generator=generator)


class ReferenceBody:
    """The blocks behind the cut, trained by torch."""

    def __init__(self) -> None:
        whole = timm.create_model(MODEL.backbone, img_size=32, num_classes=3).eval()
        whole.load_state_dict(dict(open_backbone(files(MODEL).backbone)), strict=False)
        self.blocks = whole.blocks[MODEL.cut :]
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        parameters = self.blocks.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=DECAY)

    def step(self, smashed: Tensor, gradients: Tensor) -> Tensor:
        """Train the blocks for one step; returns the smashed data's gradient."""
        leaf = smashed.clone().requires_grad_()
        self.optimizer.zero_grad()
        self.blocks(leaf).backward(gradients)
        self.optimizer.step()
        assert leaf.grad is not None
        return leaf.grad

    @torch.no_grad()
    def features(self, smashed: Tensor) -> Tensor:
        features: Tensor = self.blocks(smashed)
        return features


def test_a_restarted_server_has_the_body_and_no_open_session(tmp_path: Path) -> None:
    folder, reference = tmp_path / "node", ReferenceBody()
    with running_server(folder) as first:
        run = create_run(first, training={"split_epochs": 1})
        joining = {"name": "a", "train_samples": 8, "test_samples": 4, "num_classes": 3}
        path = f"/v1/runs/{run.id}/participants"
        response = first.api().call("POST", path, key="j", json=joining)
        credential = response.json()["credential"]
        api = first.api(credential)
        sha256 = api.assignment(run.id).state.sha256
        state = load_state(folder / "runs" / run.id / "states" / f"{sha256}.safetensors")
        for number in (0, 1):
            smashed, gradients = random_batch(number), random_batch(10 + number)
            expected = reference.features(smashed)
            for _ in range(2):  # the request and its repetition
                response = api.ask("forward", meta(number), smashed=smashed)
                torch.testing.assert_close(
                    tensor_in(response, "features"), expected, rtol=0, atol=1e-5
                )
            expected = reference.step(smashed, gradients)
            for _ in range(3):  # the server applies it once
                response = api.ask("backward", meta(number), gradients=gradients)
                returned = tensor_in(response, "gradients")
                torch.testing.assert_close(returned, expected, rtol=0, atol=1e-5)
        assert code_of(api.update(run.id, state, "u", samples=8)) == "invalid_field"
        assert code_of(api.update(run.id, state, "u", samples=8, session="t")) == "step_lost"
        assert api.update(run.id, state, "u", samples=8, session="s").is_success
        assert api.update(run.id, state, "u", samples=8, session="s").is_success, "a repetition"
        assert api.evaluate(run.id, "e", samples=4, correct=1).is_success
        assert api.assignment(run.id).round == 2
        reference.reset_optimizer()

    with running_server(folder) as again:
        api = again.api(credential)
        assert api.assignment(run.id).round == 2
        inferred = api.ask("infer", {"step": "i", "round": 2}, smashed=random_batch(5))
        expected = reference.features(random_batch(5))
        torch.testing.assert_close(tensor_in(inferred, "features"), expected, rtol=0, atol=1e-5)
        response = api.ask("forward", meta(0, round_=2), smashed=random_batch(6))
        expected = reference.features(random_batch(6))
        torch.testing.assert_close(tensor_in(response, "features"), expected, rtol=0, atol=1e-5)

    with running_server(folder) as last:  # the step of round 2 is still open
        api = last.api(credential)
        response = api.ask("backward", meta(0, round_=2), gradients=random_batch(7))
        assert code_of(response) == "step_lost"
        response = api.ask("forward", meta(0, round_=2, session="t"), smashed=random_batch(6))
        torch.testing.assert_close(tensor_in(response, "features"), expected, rtol=0, atol=1e-5)


def test_an_invalid_request_of_a_body_session_is_refused_with_its_field(
    server: RunningServer,
) -> None:
    run = create_run(server, federation={"max_repeats": 0})
    joining = {"name": "a", "train_samples": 8, "test_samples": 4, "num_classes": 3}
    path = f"/v1/runs/{run.id}/participants"
    api = server.api(server.api().call("POST", path, key="j", json=joining).json()["credential"])
    assert api.assignment(run.id).round == 1

    def refusal(kind: str, fields: dict[str, Any], **tensors: Tensor) -> tuple[str, str]:
        error = api.ask(kind, fields, **tensors).json()["error"]
        return error["code"], error.get("field", "")

    batch = random_batch(0)
    frozen = refusal("forward", {"step": "a", "round": 1}, smashed=batch)
    assert frozen == ("invalid_field", "session")
    assert refusal("forward", meta(2), smashed=batch) == ("invalid_field", "body")
    assert refusal("forward", meta(0, attempt=1), smashed=batch) == ("stale_round", "attempt")
    assert refusal("forward", meta(0, round_=2), smashed=batch) == ("stale_round", "round")
    bad = batch.clone()
    bad[0, 0, 0] = math.nan
    assert refusal("forward", meta(0), smashed=bad) == ("non_finite", "smashed")
    ids = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    for with_ids in ({"ids": ids}, {"ids": ids, "smashed": batch[:1]}):
        assert refusal("forward", meta(0), **with_ids) == ("invalid_field", "ids")
    assert refusal("backward", meta(0), gradients=batch) == ("step_lost", "session")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": {"tune": "tail"}}, "tune_body"),
        ({"model": {"prompt_count": 2}}, "prompt_count"),
        ({"model": {"cut": 6}}, "method.model.tune_body"),
        ({"model": {"cut": 4, "tail_blocks": 2}}, "method.model.tune_body"),
        ({"training": {"split_epochs": 0, "local_epochs": 1, "keep_fraction": 1}}, "tune_body"),
        ({"training": {"proximal": 0.1}}, "proximal"),
        ({"wire": {"delta_smashed": "int8"}}, "delta_smashed"),
    ],
)
def test_settings_that_a_tuned_body_does_not_support_are_refused_with_their_field(
    server: RunningServer, changes: dict[str, dict[str, Any]], field: str
) -> None:
    values = RunPlan(model=MODEL).model_dump(mode="json")
    for part, fields in changes.items():
        values[part] |= fields
    response = server.operator().call(
        "POST", "/v1/runs", key=f"no-{next(_keys)}", json=custom_settings(values)
    )
    assert code_of(response) == "invalid_field"
    error = response.json()["error"]
    assert field in f"{error['field']} {error['message']}"
