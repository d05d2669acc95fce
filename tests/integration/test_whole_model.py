"""Devices with the whole model: full fine-tuning and FedPEFT over HTTP, compared with timm."""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from edge_client.data.batches import BatchReader, shuffled
from edge_client.data.dataset import Dataset
from edge_client.participant import Participant
from edge_client.prediction import Predictor
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.federation import FederationSettings
from protocol.messages import Results, RunStatus, RunView
from protocol.plan import ModelPlan, RunPlan, TrainingPlan, WirePlan
from protocol.seeds import derive_seed
from protocol.traffic import Phase
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.export import load_exported
from split_model.checkpoints.state import load_state
from split_server.federation.export import export_run, newest_state
from tests.support.edge import files, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer

WHOLE = ModelPlan(
    backbone="test_vit",
    weights="random:0",
    image_size=32,
    cut=6,
    num_classes=3,
    prompt_count=0,
)

METHODS: dict[str, dict[str, Any]] = {
    "fl-full": {"tune": "full"},
    "fedpeft-head": {"tune": "classifier"},
    "fedpeft-bias": {"tune": "bias"},
    "fedpeft-adapter": {"tune": "adapter", "adapter_width": 24},
    "fedpeft-prompt": {"tune": "classifier", "prompt_count": 10, "prompt_depth": "deep"},
}

RATES = {"prompt_learning_rate": 0.05, "tail_learning_rate": 0.02}

WIDTH, DEPTH, CLASSIFIER = 64, 6, 3 * 65

BLOCK = 10 * WIDTH**2 + 12 * WIDTH  # its MLP is three times as wide

TUNED_PARAMETERS = {
    "fl-full": 3 * 256 * WIDTH + WIDTH + 6 * WIDTH + DEPTH * BLOCK + 2 * WIDTH + CLASSIFIER,
    "fedpeft-head": CLASSIFIER,
    "fedpeft-bias": (10 * DEPTH + 2) * WIDTH + CLASSIFIER,
    "fedpeft-adapter": 2 * WIDTH * 24 + 24 + WIDTH + CLASSIFIER,
    "fedpeft-prompt": DEPTH * 10 * WIDTH + CLASSIFIER,
}

SAMPLES, BATCH, ROUNDS, EPOCHS = 10, 4, 2, 2

SPLIT_PLANE = {"smashed", "features", "gradients", "inference"}

MAX_OVERHEAD = 8192  # bytes of a download in addition to its tensors: names, HTTP


_keys = itertools.count()


def create_run(
    server: RunningServer,
    method: str,
    wire: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    devices: int = 1,
    **training: Any,
) -> RunView:
    plain = {"local_epochs": EPOCHS, "split_epochs": 0, "keep_fraction": 1, "batch_size": BATCH}
    sgd = {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    settings = RunPlan(
        seed=3,
        model=ModelPlan.model_validate({**WHOLE.model_dump(), **METHODS[method], **(model or {})}),
        federation=FederationSettings(rounds=ROUNDS, min_participants=devices),
        wire=WirePlan.model_validate(wire or {}),
        training=TrainingPlan.model_validate(
            {**plain, **sgd, **RATES, "schedule": "constant", **training}
        ),
    )
    return server.operator().create(settings, key=f"whole-{next(_keys)}")


class Device(SilentReporter):
    """Takes part in a whole run, and records its state after each step."""

    def __init__(
        self, server: RunningServer, folder: Path, run: RunView, data: Dataset, name: str = "only"
    ) -> None:
        self.states: list[dict[str, Tensor]] = []
        with contextlib.closing(Server(server.url)) as client:
            device = Participant(client, data, folder / name, name, self)
            self.participant = device.join(run.id, key=f"join-{name}")
            self.start_bytes = client.traffic().down[Phase.DOWNLOAD]
            self.start_bytes += client.traffic().down[Phase.UPDATES]
            state_file = self.participant.files.fetch(run.state, lambda _: b"")
            self.initial = load_state(state_file)
            self.last = self.participant.take_part()
            self.traffic = client.traffic().to_dict()

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase in ("local", "split"):
            self.states.append(self.participant.model.state())


class Uncut:
    """timm's model: parameters to tune are chosen by name; hooks add prompts and adapter."""

    def __init__(self, model: ModelPlan, state: dict[str, Tensor]) -> None:
        self.model = timm.create_model(model.backbone, img_size=32, num_classes=3).eval()
        initial = {name: value.clone() for name, value in state.items()}
        weights = dict(open_backbone(files(WHOLE).backbone))
        weights |= {name: initial["tail." + name] for name in ("head.weight", "head.bias")}
        self.model.load_state_dict(weights)
        self.model.requires_grad_(False)
        self.tuned: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            part = "tail." if name.split(".")[0] in ("norm", "head") else "head."
            if name.startswith("blocks.") and int(name.split(".")[1]) >= model.cut:
                continue  # the body's
            is_tuned = name.startswith("head.") or model.tune == "full"
            if is_tuned or (model.tune == "bias" and "bias" in name):
                self.tuned[part + name] = parameter.requires_grad_()
        for name in initial:
            if name == "prompts" or name.startswith("head.adapter."):
                self.tuned[name] = initial[name].requires_grad_()
        assert self.tuned.keys() == state.keys()
        for number, block in enumerate(self.model.blocks[: model.cut]):
            if model.prompt_count:
                block.register_forward_pre_hook(self._insert_prompts_hook(number))
            if model.tune == "adapter":
                block.register_forward_hook(self._add_adapter)

    def _insert_prompts_hook(self, number: int) -> Any:
        def insert_prompts(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (tokens,) = arguments
            prompts = self.tuned["prompts"][number].repeat(len(tokens), 1, 1)
            patches = tokens[
                :, -4:
            ]  # 2 x 2, after the class token and the previous block's prompts
            return (torch.cat([tokens[:, :1], prompts, patches], dim=1),)

        return insert_prompts

    def _add_adapter(self, _: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        adapter = {name.removeprefix("head.adapter."): t for name, t in self.tuned.items()}
        inner = F.gelu(F.linear(tokens, adapter["down.weight"], adapter["down.bias"]))
        return tokens + F.linear(inner, adapter["up.weight"], adapter["up.bias"])

    def optimizer(self) -> torch.optim.Optimizer:
        weights = [tensor for name, tensor in self.tuned.items() if name != "prompts"]
        groups = [{"params": weights, "lr": RATES["tail_learning_rate"], "weight_decay": 1e-4}]
        if "prompts" in self.tuned:
            prompts = {"params": [self.tuned["prompts"]], "lr": RATES["prompt_learning_rate"]}
            groups.append({**prompts, "weight_decay": 0.0})
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class FinishedRun:
    method: str
    run: RunView  # before its first round
    device: Device


@pytest.fixture(scope="module", params=METHODS)
def finished(
    request: pytest.FixtureRequest, server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """A run of one device with each method."""
    run = create_run(server, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return FinishedRun(request.param, run, Device(server, folder, run, two_sets()))


def test_one_device_equals_timms_model_in_each_step(finished: FinishedRun, data_dir: Path) -> None:
    assert_equal_steps(finished.device, finished.run, data_dir, "local")


@pytest.mark.parametrize("method", ["fl-full", "fedpeft-bias", "fedpeft-adapter", "fedpeft-prompt"])
def test_a_tuned_head_with_a_body_on_the_server_equals_timms_model_in_each_step(
    server: RunningServer, data_dir: Path, tmp_path: Path, method: str
) -> None:
    split = {"local_epochs": 0, "split_epochs": EPOCHS}
    run = create_run(server, method, model={"cut": 3}, **split)
    device = Device(server, tmp_path, run, two_sets())
    assert_equal_steps(device, run, data_dir, "split")
    assert device.traffic.keys() >= SPLIT_PLANE


def two_sets() -> Dataset:
    return Dataset(image_set(SAMPLES), image_set(7, seed=1))


def assert_equal_steps(device: Device, run: RunView, data_dir: Path, purpose: str) -> None:
    """Check each step of the run against timm's model in one process."""
    assert device.last.status is RunStatus.FINISHED
    uncut = Uncut(run.plan.model, device.initial)
    samples = BatchReader(image_set(SAMPLES), device.participant.model.preprocessing)
    step = 0
    for round_ in range(1, ROUNDS + 1):
        optimizer = uncut.optimizer()  # momentum starts at zero in each round
        seed = derive_seed(3, purpose, "only", round_)
        for epoch in range(EPOCHS):
            for positions in shuffled(SAMPLES, BATCH, seed, epoch):
                images, labels = read(samples, positions)
                optimizer.zero_grad()
                F.cross_entropy(uncut.model(images), labels).backward()
                optimizer.step()
                for name, value in device.states[step].items():
                    expected = uncut.tuned[name].detach()
                    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5, err_msg=name)
                step += 1
    assert step == len(device.states) == ROUNDS * EPOCHS * 3
    _, final = newest_state(data_dir, run.id)
    for name, value in final.items():
        torch.testing.assert_close(value, uncut.tuned[name].detach(), rtol=0, atol=1e-5, msg=name)
        assert not torch.equal(value, device.initial[name]), f"{name} has not changed"


def test_bytes_export_and_predictions_of_a_whole_run(
    finished: FinishedRun, server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    method, run, device, data = finished.method, finished.run, finished.device, two_sets()

    # No request to the split plane; updates contain only tuned parameters.
    traffic = device.traffic
    assert traffic["control"]["up"]
    assert not SPLIT_PLANE & traffic.keys(), "phases without bytes are not listed"
    tuned = 4 * TUNED_PARAMETERS[method]
    assert sum(tensor.numel() for tensor in device.initial.values()) * 4 == tuned
    assert ROUNDS * tuned <= traffic["updates"]["up"] <= ROUNDS * (tuned + MAX_OVERHEAD)

    # Before the first round: each parameter once, in the head or the state file.
    added = (
        TUNED_PARAMETERS[method] - CLASSIFIER if "adapter" in method or "prompt" in method else 0
    )
    whole = 4 * (TUNED_PARAMETERS["fl-full"] + added)
    assert whole <= device.start_bytes <= whole + 2 * MAX_OVERHEAD
    if method == "fl-full":
        assert run.head.nbytes < 1000, "the head file has no weights"

    # The server, the device and the exported file agree.
    response = server.operator().call("GET", f"/v1/runs/{run.id}/results")
    results = Results.model_validate(response.json())
    assert [round_.samples for round_ in results.rounds] == [SAMPLES] * ROUNDS
    assert all(r.local_loss is not None and r.train_loss is None for r in results.rounds)
    out = tmp_path / "model.safetensors"
    export_run(data_dir, run.id, out)
    assert out.stat().st_size <= whole + 2 * MAX_OVERHEAD, "no weight is in the file twice"
    exported = load_exported(out)
    model = device.participant.model
    images, labels = read(BatchReader(data.test, model.preprocessing), range(7))
    with torch.no_grad():
        logits = model.tail(model.head(images, model.prompts))
        torch.testing.assert_close(exported(images), logits, rtol=0, atol=1e-5)
    assert results.rounds[-1].accuracy == int((logits.argmax(1) == labels).sum()) / 7

    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(data.test.store.read(number).transpose(1, 2, 0).copy()).save(path)
    with contextlib.closing(Server(server.url)) as client:
        folder = tmp_path / "predictions"
        predictor = Predictor.join(client, results.run, folder, "predict", "me (predict)")
        predictions = list(predictor.predict(paths, top=3))
        traffic = client.traffic().to_dict()
    assert traffic["control"]["up"]
    assert not SPLIT_PLANE & traffic.keys(), "phases without bytes are not listed"
    for prediction, row in zip(predictions, logits.softmax(dim=1), strict=True):
        for name, probability in prediction.classes:
            assert probability == pytest.approx(float(row[int(name)]), abs=1e-5)


@pytest.mark.parametrize("method", ["fl-full", "fedpeft-bias", "fedpeft-prompt"])
def test_two_devices_with_quantised_deltas_end_with_the_server_s_state(
    server: RunningServer, data_dir: Path, tmp_path: Path, method: str
) -> None:
    wire = {"update_deltas": True, "updates": "float16", "head": "int8"}
    run = create_run(server, method, wire, devices=2, proximal=0.01)
    devices: list[Device] = []

    def take_part(name: str, seed: int) -> None:
        data = Dataset(image_set(SAMPLES, seed=seed), image_set(7, seed=1))
        devices.append(Device(server, tmp_path, run, data, name))

    threads = [threading.Thread(target=take_part, args=(f"d{n}", n)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(devices) == 2
    finished, final = newest_state(data_dir, run.id)
    assert finished.status is RunStatus.FINISHED
    for device in devices:
        tuned = 4 * TUNED_PARAMETERS[method]
        assert device.traffic["updates"]["up"] < ROUNDS * (tuned / 2 + MAX_OVERHEAD)
        state = device.participant.model.state()
        assert all(np.array_equal(state[name], value) for name, value in final.items())
    export_run(data_dir, run.id, tmp_path / "model.safetensors")
    model = devices[0].participant.model
    images, _ = read(BatchReader(image_set(7, seed=1), model.preprocessing), range(7))
    with torch.no_grad():
        logits = model.tail(model.head(images, model.prompts))
        exported = load_exported(tmp_path / "model.safetensors")(images)
    torch.testing.assert_close(exported, logits, rtol=0, atol=1e-5)
