"""Devices that hold the whole model: full fine-tuning and FedPEFT over HTTP, against timm's own."""

from __future__ import annotations

import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from edge_client.data import BatchReader, Dataset, shuffled
from edge_client.participant import Participant
from edge_client.prediction import Predictor
from edge_client.transport import Server
from protocol.federation import FederationSettings
from protocol.messages import Results, RunStatus, RunView
from protocol.plan import ModelPlan, RunPlan, TrainingPlan, WirePlan
from protocol.seeds import derive_seed
from protocol.traffic import Phase
from split_model import load_exported, load_state, open_backbone
from split_model.backbone.libraries import timm
from split_server.federation.export import export_run, newest_state
from tests.support.edge import files, image_set
from tests.support.server import RunningServer

WHOLE = ModelPlan(
    backbone="vit_tiny_patch16_224",
    weights="random:0",
    image_size=32,
    cut=12,
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

WIDTH, DEPTH, CLASSIFIER = 192, 12, 3 * 193

BLOCK = 12 * WIDTH**2 + 13 * WIDTH

NUMBERS = {
    "fl-full": 3 * 256 * WIDTH + WIDTH + 6 * WIDTH + DEPTH * BLOCK + 2 * WIDTH + CLASSIFIER,
    "fedpeft-head": CLASSIFIER,
    "fedpeft-bias": (11 * DEPTH + 2) * WIDTH + CLASSIFIER,
    "fedpeft-adapter": 2 * WIDTH * 24 + 24 + WIDTH + CLASSIFIER,
    "fedpeft-prompt": DEPTH * 10 * WIDTH + CLASSIFIER,
}

SAMPLES, BATCH, ROUNDS, EPOCHS = 10, 4, 2, 2

SPLIT_PLANE = {"smashed", "features", "gradients", "inference"}

HEADERS = 32_768  # bytes of a download beside its tensors, at most: names, HTTP


_keys = itertools.count()


def created(
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


class Device:
    """A whole run of one device, and its state after each step."""

    def __init__(
        self, server: RunningServer, folder: Path, run: RunView, data: Dataset, name: str = "only"
    ) -> None:
        self.states: list[dict[str, Tensor]] = []
        with contextlib.closing(Server(server.url)) as client:
            device = Participant(client, data, folder / name, name, self)
            self.participant = device.join(run.id, key=f"join-{name}")
            self.start_bytes = client.traffic().down[Phase.DOWNLOAD]
            self.start_bytes += client.traffic().down[Phase.UPDATES]
            held = self.participant.files.fetch(run.state, lambda _: b"")
            self.initial = load_state(held)
            self.last = self.participant.take_part()
            self.traffic = client.traffic().to_dict()

    def event(self, kind: str, **data: Any) -> None:
        pass

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase in ("local", "split"):
            self.states.append(self.participant.model.state())

    def close(self) -> None:
        pass


class Uncut:
    """timm's own model: what is tuned is chosen by name; prompts and adapter come by hooks."""

    def __init__(self, model: ModelPlan, state: dict[str, Tensor]) -> None:
        self.model = timm.create_model(model.backbone, img_size=32, num_classes=3).eval()
        own = {name: value.clone() for name, value in state.items()}
        weights = dict(open_backbone(files(WHOLE).backbone))
        weights |= {name: own["tail." + name] for name in ("head.weight", "head.bias")}
        self.model.load_state_dict(weights)
        self.model.requires_grad_(False)
        self.tuned: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            part = "tail." if name.split(".")[0] in ("norm", "head") else "head."
            if name.startswith("blocks.") and int(name.split(".")[1]) >= model.cut:
                continue  # the body's
            chosen = name.startswith("head.") or model.tune == "full"
            if chosen or (model.tune == "bias" and "bias" in name):
                self.tuned[part + name] = parameter.requires_grad_()
        for name in own:
            if name == "prompts" or name.startswith("head.adapter."):
                self.tuned[name] = own[name].requires_grad_()
        assert self.tuned.keys() == state.keys()
        for number, block in enumerate(self.model.blocks[: model.cut]):
            if model.prompt_count:
                block.register_forward_pre_hook(self._prompted(number))
            if model.tune == "adapter":
                block.register_forward_hook(self._adapted)

    def _prompted(self, number: int) -> Any:
        def put_in(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (tokens,) = arguments
            prompts = self.tuned["prompts"][number].repeat(len(tokens), 1, 1)
            patches = tokens[:, -4:]  # 2 x 2, behind the class token and the last block's prompts
            return (torch.cat([tokens[:, :1], prompts, patches], dim=1),)

        return put_in

    def _adapted(self, _: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        own = {name.removeprefix("head.adapter."): t for name, t in self.tuned.items()}
        inner = F.gelu(F.linear(tokens, own["down.weight"], own["down.bias"]))
        return tokens + F.linear(inner, own["up.weight"], own["up.bias"])

    def optimizer(self) -> torch.optim.Optimizer:
        weights = [tensor for name, tensor in self.tuned.items() if name != "prompts"]
        groups = [{"params": weights, "lr": RATES["tail_learning_rate"], "weight_decay": 1e-4}]
        if "prompts" in self.tuned:
            prompts = {"params": [self.tuned["prompts"]], "lr": RATES["prompt_learning_rate"]}
            groups.append({**prompts, "weight_decay": 0.0})
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("method", METHODS)
def test_one_device_tunes_as_timms_own_model_step_by_step(
    server: RunningServer, data_dir: Path, tmp_path: Path, method: str
) -> None:
    run = created(server, method)
    device = Device(server, tmp_path, run, two_sets())
    require_equal_steps(device, run, data_dir, "local")


@pytest.mark.parametrize("method", ["fl-full", "fedpeft-bias", "fedpeft-adapter", "fedpeft-prompt"])
def test_a_tuned_head_learns_through_the_body_of_the_server(
    server: RunningServer, data_dir: Path, tmp_path: Path, method: str
) -> None:
    split = {"local_epochs": 0, "split_epochs": EPOCHS}
    run = created(server, method, model={"cut": 3}, **split)
    device = Device(server, tmp_path, run, two_sets())
    require_equal_steps(device, run, data_dir, "split")
    assert device.traffic.keys() >= SPLIT_PLANE


def two_sets() -> Dataset:
    return Dataset(image_set(SAMPLES), image_set(7, seed=1))


def require_equal_steps(device: Device, run: RunView, data_dir: Path, purpose: str) -> None:
    """Every step of the run is that of timm's own model in one process."""
    assert device.last.status is RunStatus.FINISHED
    uncut = Uncut(run.settings.plan.model, device.initial)
    samples = BatchReader(image_set(SAMPLES), device.participant.model.preprocessing)
    step = 0
    for round_ in range(1, ROUNDS + 1):
        optimizer = uncut.optimizer()  # its momentum begins anew in every round
        seed = derive_seed(3, purpose, "only", round_)
        for epoch in range(EPOCHS):
            for positions in shuffled(SAMPLES, BATCH, seed, epoch):
                images, labels = samples.read(positions)
                optimizer.zero_grad()
                F.cross_entropy(uncut.model(images), labels).backward()
                optimizer.step()
                for name, value in device.states[step].items():
                    expected = uncut.tuned[name].detach()
                    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=name)
                step += 1
    assert step == len(device.states) == ROUNDS * EPOCHS * 3
    _, final = newest_state(data_dir, run.id)
    for name, value in final.items():
        torch.testing.assert_close(value, uncut.tuned[name].detach(), rtol=0, atol=1e-5, msg=name)
        unmoved = torch.equal(value, device.initial[name])
        assert not unmoved, f"{name}: the comparison is of models that stand still"


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run_with_its_bytes_its_export_and_its_predictions(
    server: RunningServer, data_dir: Path, tmp_path: Path, method: str
) -> None:
    run = created(server, method)
    data = two_sets()
    device = Device(server, tmp_path, run, data)

    # Nothing is asked of the split plane, and the updates are what is tuned.
    moved = device.traffic
    assert moved["control"]["up"]
    assert not SPLIT_PLANE & moved.keys(), "nothing that has no byte is counted"
    tuned = 4 * NUMBERS[method]
    assert sum(tensor.numel() for tensor in device.initial.values()) * 4 == tuned
    assert ROUNDS * tuned <= moved["updates"]["up"] <= ROUNDS * (tuned + HEADERS)

    # To start: every number of the model once, in one file or the other.
    added = NUMBERS[method] - CLASSIFIER if "adapter" in method or "prompt" in method else 0
    whole = 4 * (NUMBERS["fl-full"] + added)
    assert whole <= device.start_bytes <= whole + 2 * HEADERS
    if method == "fl-full":
        assert run.head.nbytes < 1000, "a file without a weight"

    # The server's copy of the model, the device and the exported file say the same.
    answer = server.operator().call("GET", f"/v1/runs/{run.id}/results")
    results = Results.model_validate(answer.json())
    assert [one.samples for one in results.rounds] == [SAMPLES] * ROUNDS
    assert all(one.local_loss is not None and one.train_loss is None for one in results.rounds)
    out = tmp_path / "model.safetensors"
    export_run(data_dir, run.id, out)
    assert out.stat().st_size <= whole + 2 * HEADERS, "no weight stands there twice"
    exported = load_exported(out)
    model = device.participant.model
    images, labels = BatchReader(data.test, model.preprocessing).read(range(7))
    with torch.no_grad():
        logits = model.tail(model.head(images, model.prompts))
        torch.testing.assert_close(exported(images), logits, rtol=0, atol=1e-5)
    assert results.rounds[-1].accuracy == int((logits.argmax(1) == labels).sum()) / 7

    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(data.test.store.read(number).permute(1, 2, 0).numpy()).save(path)
    with contextlib.closing(Server(server.url)) as client:
        folder = tmp_path / "predictions"
        predictor = Predictor.join(client, results.run, folder, "predict", "me (predict)")
        found = list(predictor.predict(paths, top=3))
        moved = client.traffic().to_dict()
    assert moved["control"]["up"]
    assert not SPLIT_PLANE & moved.keys(), "nothing that has no byte is counted"
    for prediction, shares in zip(found, logits.softmax(dim=1), strict=True):
        for name, share in prediction.classes:
            assert share == pytest.approx(float(shares[int(name)]), abs=1e-5)


@pytest.mark.parametrize("method", ["fl-full", "fedpeft-bias", "fedpeft-prompt"])
def test_two_devices_with_coded_changes_end_with_the_server_s_state(
    server: RunningServer, data_dir: Path, tmp_path: Path, method: str
) -> None:
    wire = {"update_deltas": True, "updates": "float16", "head": "int8"}
    run = created(server, method, wire, devices=2, proximal=0.01)
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
        tuned = 4 * NUMBERS[method]
        assert device.traffic["updates"]["up"] < ROUNDS * (tuned / 2 + HEADERS)
        held = device.participant.model.state()
        assert all(torch.equal(held[name], value) for name, value in final.items())
    export_run(data_dir, run.id, tmp_path / "model.safetensors")
    model = devices[0].participant.model
    images, _ = BatchReader(image_set(7, seed=1), model.preprocessing).read(range(7))
    with torch.no_grad():
        logits = model.tail(model.head(images, model.prompts))
        exported = load_exported(tmp_path / "model.safetensors")(images)
    torch.testing.assert_close(exported, logits, rtol=0, atol=1e-5)
