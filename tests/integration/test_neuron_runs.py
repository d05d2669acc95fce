"""Runs whose proxy is distilled again after rounds: new heads, restarts, refused settings."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.participant import Participant
from edge_client.torch_model import TorchModel, read
from edge_client.transport.client import Server
from protocol.messages import Assignment, BlobRef, JoinResponse, RunStatus, RunView, Task
from protocol.plan import RunPlan
from split_model.backbone.tensor_file import TensorFile
from split_model.checkpoints.state import load_state, state_shapes
from split_server.client import OperatorClient
from split_server.method import Rebuild
from split_server.storage.run_files import RunFiles
from tests.integration.test_whole_model import WHOLE
from tests.support.edge import image_set
from tests.support.federation import OPERATOR
from tests.support.reporters import ListReporter
from tests.support.server import ApiClient, RunningServer, joined, running_server, wait_until
from tests.support.settings import custom_settings
from tuning_methods.fedpft import server as fedpft_server
from tuning_methods.proxies.neurons import NEURONS

WIDTH = 24  # neurons of 192 that the proxy keeps in a block

LAYERS = 4

PRUNED = {"tune": "lora", "lora_rank": 2, "mlp_widths": [0, *[WIDTH] * LAYERS, 0]}

DISTILLATION = {"epochs": 1, "samples": 8, "batch_size": 8, "every": 1}


NO_EVALUATION: dict[str, Any] = {"evaluate_every": 0}

_keys = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[RunningServer]:
    with running_server(data_dir) as running:
        yield running


def settings(**parts: dict[str, Any]) -> RunPlan:
    device_only = {"split_epochs": 0, "keep_fraction": 1, "local_epochs": 1, "batch_size": 5}
    changes = {part: dict(fields) for part, fields in parts.items()}
    model = {**WHOLE.model_dump(), **PRUNED, **changes.pop("model", {})}
    rest = {
        "federation": {"rounds": 3, **changes.pop("federation", {})},
        "training": {**device_only, "tail_learning_rate": 0.01, **changes.pop("training", {})},
        "method": {"distillation": {**DISTILLATION, **changes.pop("distillation", {})}},
    }
    return RunPlan.model_validate({"model": model, **rest, **changes})


def create_run(server: RunningServer, **parts: dict[str, Any]) -> RunView:
    return server.operator().create(settings(**parts), key=f"neurons-{next(_keys)}")


def results_of(server: RunningServer, run: str) -> Any:
    with contextlib.closing(OperatorClient(server.url, OPERATOR)) as operator:
        return operator.results(run)


def redistillations(api: ApiClient, run: str) -> list[dict[str, Any]]:
    events = api.call("GET", f"/v1/runs/{run}/events?after=0").json()
    return [event["data"] for event in events if event["kind"] == "model_rebuilt"]


def inactive_shares(model: TorchModel, images: Tensor) -> Tensor:
    """The share of outputs at or below zero for each neuron, [blocks, neurons], by hooks."""
    outputs: dict[int, Tensor] = {}
    hooks = [
        model.head.blocks[str(number)].mlp.act.register_forward_hook(  # type: ignore[union-attr]
            lambda _, __, out, number=number: outputs.update({number: out})
        )
        for number in range(1, LAYERS + 1)
    ]
    with torch.no_grad():
        model.head(images, model.prompts)
    for hook in hooks:
        hook.remove()
    return torch.stack(
        [(outputs[number] <= 0).double().mean(dim=(0, 1)) for number in range(1, LAYERS + 1)]
    )


def test_a_device_downloads_each_new_head_and_continues(
    server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    run = create_run(server)
    reporter, data = ListReporter(), Dataset(image_set(10), image_set(7, seed=1))
    with contextlib.closing(Server(server.url)) as client:
        device = Participant(client, data, tmp_path, "only", reporter)
        participant = device.join(run.id, key="join-only")
        assert participant.take_part().status is RunStatus.FINISHED
        down = client.traffic().to_dict()["download"]["down"]
    assert len(reporter.of("trained")) == len(reporter.of("evaluated")) == 3

    results = results_of(server, run.id)
    heads = [
        run.head.sha256,
        *(event["head"] for event in redistillations(server.operator(), run.id)),
    ]
    assert [event["round"] for event in redistillations(server.operator(), run.id)] == [1, 2], (
        "not after the last round"
    )
    assert len(set(heads)) == 3
    assert results.run.head.sha256 == heads[-1]
    assert [event["sha256"] for event in reporter.of("head-taken")] == heads[1:]
    assert 0 <= down - 3 * run.head.nbytes < 3 * 2000, "each head was downloaded once"
    assert results.traffic["download"]["down"] == down

    model = participant.model
    proxy = TensorFile(RunFiles(data_dir / "runs" / run.id).weights_after(2))
    for number in range(LAYERS + 2):
        for layer in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            parameter = model.head.blocks[str(number)].get_parameter(f"mlp.{layer}")
            assert torch.equal(parameter, proxy[f"blocks.{number}.mlp.{layer}"])

    # The shares that the server ranked after round 2, computed again from that round's files.
    files = RunFiles(data_dir / "runs" / run.id)
    state = files.state(results.rounds[1].state.sha256)
    model_then = TorchModel.load(run.plan.model, tmp_path / f"{heads[1]}.safetensors", state)
    images, _ = read(BatchReader(image_set(10), model_then.preprocessing), range(10))
    expected = inactive_shares(model_then, images)
    torch.testing.assert_close(files.read_extras(2)[NEURONS].double(), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01
    retained = expected.argsort(dim=1, stable=True)[:, : WIDTH // 2]
    old = TensorFile(tmp_path / f"{heads[1]}.safetensors")
    for row, number in enumerate(range(1, LAYERS + 1)):
        name = f"blocks.{number}.mlp.fc1.weight"
        same = [torch.equal(old[name][n], proxy[name][n]) for n in range(WIDTH)]
        assert {n for n in range(WIDTH) if same[n]} == set(retained[row].tolist())
    folders = {
        path.name: len(list(path.iterdir())) for path in files.root.iterdir() if path.is_dir()
    }
    assert (folders["extras"], folders["weights"], folders["heads"]) == (1, 1, 1)


def state_with_shares(value: float, share: float | Tensor) -> dict[str, Tensor]:
    """A state with this number everywhere, and each neuron's share of inactive outputs."""
    split = settings(model={"num_classes": 10}).model
    state = {name: torch.full(shape, value) for name, shape in state_shapes(split).items()}
    shares = share if isinstance(share, Tensor) else torch.full((LAYERS, WIDTH), share)
    return {**state, "neurons": shares}


def ten_classes(**parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parts of the settings of a run that `joined` can join."""
    return {"model": {"num_classes": 10}, **parts}


def test_shares_are_averaged_by_samples_and_accepted_only_before_a_redistillation(
    server: RunningServer, data_dir: Path
) -> None:
    parts = ten_classes(
        federation={**NO_EVALUATION, "min_participants": 2}, distillation={"every": 2}
    )
    run = create_run(server, **parts)
    a, b = joined(server, run.id, "a"), joined(server, run.id, "b")
    plain = {n: t for n, t in state_with_shares(0.1, 0.0).items() if n != "neurons"}
    refused = a.update(run.id, state_with_shares(0.1, 0.0), "a-1", samples=10)
    assert refused.json()["error"]["code"] == "wrong_shape", "no redistillation follows this round"
    assert b.update(run.id, plain, "b-1", samples=30).is_success
    wait_until(lambda: a.assignment(run.id).round == 2)
    assert a.assignment(run.id).head == run.head
    assert a.update(run.id, state_with_shares(0.1, 0.2), "a-2", samples=10, round=2).is_success
    assert b.update(run.id, state_with_shares(0.1, 0.6), "b-2", samples=30, round=2).is_success
    wait_until(lambda: (a.assignment(run.id), b.assignment(run.id))[1].round == 3, 60)
    shares = RunFiles(data_dir / "runs" / run.id).read_extras(2)[NEURONS]
    torch.testing.assert_close(shares, torch.full((LAYERS, WIDTH), 0.5))
    assert a.assignment(run.id).head != run.head
    old = a.call("GET", f"/v1/runs/{run.id}/head?sha256={run.head.sha256}")
    assert (old.status_code, old.json()["error"]["code"]) == (404, "not_found")
    assert a.call("GET", f"/v1/runs/{run.id}/head?sha256=x").json()["error"]["field"] == "sha256"


@pytest.mark.parametrize(
    ("neurons", "code"),
    [
        (None, "wrong_shape"),
        (torch.zeros(LAYERS, WIDTH + 1), "wrong_shape"),
        (torch.full((LAYERS, WIDTH), float("nan")), "non_finite"),
        (torch.full((LAYERS, WIDTH), 1.25), "invalid_field"),
        (torch.full((LAYERS, WIDTH), -0.25), "invalid_field"),
    ],
    ids=["missing", "shape", "nan", "above", "below"],
)
def test_an_update_without_valid_shares_of_its_neurons_is_refused(
    server: RunningServer, neurons: Tensor | None, code: str
) -> None:
    run = create_run(server, **ten_classes(federation={**NO_EVALUATION, "min_participants": 2}))
    device = joined(server, run.id, "a")
    joined(server, run.id, "b")
    state = state_with_shares(0.1, 0.0)
    state = {n: t for n, t in state.items() if n != "neurons"}
    if neurons is not None:
        state["neurons"] = neurons
    error = device.update(run.id, state, "update").json()["error"]
    assert (error["code"], error["field"]) == (code, "neurons")
    again = device.update(run.id, state_with_shares(0.1, 0.0), "again")
    assert again.is_success or code != "invalid_field", "a corrected update is accepted"


def slow_down_redistillation(patch: pytest.MonkeyPatch) -> None:
    """Let each batch of a redistillation take as long as with a larger model."""
    real = fedpft_server._write_proxy

    def slow(work: Rebuild) -> None:
        def slow_check() -> None:
            time.sleep(0.5)
            work.check()

        real(replace(work, check=slow_check))

    patch.setattr(fedpft_server, "_write_proxy", slow)


def test_a_restarted_server_completes_an_interrupted_redistillation(tmp_path: Path) -> None:
    parts = ten_classes(federation=NO_EVALUATION | {"rounds": 2}, distillation={"epochs": 8})
    generator = torch.Generator().manual_seed(3)
    state = state_with_shares(0.1, torch.rand(LAYERS, WIDTH, generator=generator))
    with pytest.MonkeyPatch.context() as patch, running_server(tmp_path) as first:
        slow_down_redistillation(patch)
        run = create_run(first, **parts)
        device = joined(first, run.id)
        token = device.http.headers["authorization"].removeprefix("Bearer ")
        assert device.update(run.id, state, "one").is_success
        files = RunFiles(tmp_path / "runs" / run.id)
        assert (files.root / "extras" / "1.safetensors").is_file(), (
            "shares are on disk when the update is answered"
        )
    assert not files.weights_after(1).exists(), "the server stopped in the middle"
    with running_server(tmp_path) as second:
        device = second.api(token)
        assert device.assignment(run.id).head == run.head
        wait_until(lambda: device.assignment(run.id).round == 2, 60)
        new_head = device.assignment(run.id).head
        assert new_head is not None
        assert new_head != run.head
        content = device.call("GET", f"/v1/runs/{run.id}/head?sha256={new_head.sha256}").content
        assert len(content) == new_head.nbytes

        other = create_run(second, **parts)  # without an interruption
        device = joined(second, other.id)
        assert device.update(other.id, state, "one").is_success
        wait_until(lambda: device.assignment(other.id).round == 2, 60)
        assert device.assignment(other.id).head == new_head


def test_a_cancelled_run_does_not_wait_for_its_redistillation(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down_redistillation(monkeypatch)
    run = create_run(server, **ten_classes(federation=NO_EVALUATION, distillation={"epochs": 2}))
    device = joined(server, run.id)
    assert device.update(run.id, state_with_shares(0.1, 0.5), "one").is_success
    response = server.operator().call("POST", f"/v1/runs/{run.id}/cancel", key="cancel")
    assert response.json()["status"] == "cancelled"
    assert device.assignment(run.id).task == "stop"
    assert redistillations(server.operator(), run.id) == []


def test_a_redistillation_that_diverges_fails_its_run(server: RunningServer) -> None:
    any_length = {**NO_EVALUATION, "update_norm_bound": None}
    run = create_run(
        server, **ten_classes(federation=any_length, distillation={"learning_rate": 1.0})
    )
    device = joined(server, run.id)
    assert device.update(run.id, state_with_shares(3e38, 0.5), "one").is_success
    wait_until(lambda: device.assignment(run.id).task == "stop", 60)
    last = device.assignment(run.id)
    assert last.status is RunStatus.FAILED
    assert "rebuilding the model after round 1" in str(last.reason)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        (
            {"model": {"mlp_widths": [], "blocks": [0, 2, 3, 5], "cut": 4}},
            "method.distillation.every",
        ),
        ({"model": {"mlp_widths": []}, "distillation": {"epochs": 0}}, "method.distillation.every"),
        ({"model": {"mlp_widths": [0] * 6}}, "method.distillation.every"),
        ({"distillation": {"epochs": 0}}, "method.distillation.every"),
        ({"federation": {"dp_clip": 1.0}}, "method.distillation.every"),
        ({"distillation": {"retained": 1.0}}, "method.distillation.retained"),
        ({"distillation": {"every": -1}}, "method.distillation.every"),
        ({"model": {"cut": 5}}, "method.model.cut"),
        ({"model": {"mlp_widths": [0, *[WIDTH] * 9, 8, 0]}}, "method.model.mlp_widths"),
        ({"model": {"mlp_widths": [WIDTH] * 5}}, "method.model.mlp_widths"),
        ({"model": {"mlp_widths": [193] * 6}}, "method.model.mlp_widths"),
    ],
)
def test_settings_that_redistillation_does_not_support_are_refused(
    server: RunningServer, parts: dict[str, dict[str, Any]], field: str
) -> None:
    values = settings().model_dump(mode="json")
    values |= {"distillation": values["method"]["distillation"]}
    for part, fields in parts.items():
        values[part] |= fields
    values["method"] = {"distillation": values.pop("distillation")}
    response = server.operator().call(
        "POST", "/v1/runs", key=f"no-{next(_keys)}", json=custom_settings(values)
    )
    error = response.json()["error"]
    assert (error["code"], error["field"]) == ("invalid_field", field)


def test_a_state_on_disk_contains_no_shares_of_neurons(
    server: RunningServer, data_dir: Path
) -> None:
    run = create_run(server, **ten_classes(federation=NO_EVALUATION | {"rounds": 2}))
    device = joined(server, run.id)
    assert device.update(run.id, state_with_shares(0.5, 0.5), "one").is_success
    wait_until(lambda: device.assignment(run.id).round == 2, 60)
    assert device.assignment(run.id).state.sha256 != run.state.sha256
    files = RunFiles(data_dir / "runs" / run.id)
    state = load_state(files.state(device.assignment(run.id).state.sha256))
    assert set(state) == set(state_with_shares(0, 0)) - {"neurons"}


class OutdatedServer(Server):
    """Names heads that the run no longer has."""

    deleted = BlobRef(sha256="0" * 64, nbytes=5)

    def join(self, *arguments: Any) -> JoinResponse:
        response = super().join(*arguments)
        run = response.run.model_copy(update={"head": self.deleted})
        return response.model_copy(update={"run": run})

    def assignment(self, run: str, after: Assignment | None, wait_s: float) -> Assignment:
        assignment = super().assignment(run, after, wait_s)
        if assignment.round == 1 and assignment.task is Task.TRAIN:
            return assignment.model_copy(update={"head": self.deleted})
        return assignment


def test_a_device_whose_head_was_deleted_requests_a_new_assignment(
    server: RunningServer, tmp_path: Path
) -> None:
    run = create_run(server, federation={"rounds": 2, "round_timeout_s": 4.0, "max_repeats": 0})
    reporter, data = ListReporter(), Dataset(image_set(10), image_set(7, seed=1))
    path = f"/v1/runs/{run.id}/cancel"
    with contextlib.closing(OutdatedServer(server.url)) as client:
        device = Participant(client, data, tmp_path, "late", reporter)
        participant = device.join(run.id, "join-late")
        assert participant.run.head == run.head, "it requested the run again"
        cancel = threading.Timer(2, lambda: server.operator().call("POST", path, key="cancel"))
        cancel.start()
        last = participant.take_part()
        cancel.join()
    assert last.status is RunStatus.CANCELLED, "no device trained"
    [event] = reporter.of("left-behind")
    assert event["round"] == 1
    assert reporter.of("trained") == []


def test_redistillation_works_with_update_deltas_and_a_quantised_head(
    server: RunningServer, tmp_path: Path
) -> None:
    wire = {"update_deltas": True, "updates": "float16", "head": "int8"}
    prompted = {"prompt_count": 3, "prompt_at": "input"}
    run = create_run(server, federation={"rounds": 2}, wire=wire, model=prompted)
    reporter, data = ListReporter(), Dataset(image_set(10), image_set(7, seed=1))
    with contextlib.closing(Server(server.url)) as client:
        device = Participant(client, data, tmp_path, "only", reporter)
        participant = device.join(run.id, "join-rounded")
        assert participant.take_part().status is RunStatus.FINISHED
    [taken] = reporter.of("head-taken")
    head = results_of(server, run.id).run.head
    assert (taken["sha256"], taken["bytes"]) == (head.sha256, head.nbytes)
    assert len(reporter.of("trained")) == 2
