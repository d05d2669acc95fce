"""Changes of smashed data instead of whole smashed data, over HTTP with a small model."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from edge_client.data.dataset import Dataset
from edge_client.participant import Participant
from edge_client.torch_model import read
from edge_client.training.split_training import Sample
from edge_client.transport.client import Server
from edge_client.transport.split_client import Payload, SamplesMissing
from protocol.codecs.registry import as_decoded
from protocol.federation import FederationSettings
from protocol.plan import RunPlan, TrainingPlan, WirePlan
from protocol.traffic import Phase
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.state import load_state
from split_model.parts.build import build_body
from split_server.storage.sample_store import Owner, SampleStore
from tests.support.edge import SMALL, device_model, files, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import (
    ApiClient,
    RunningServer,
    code_of,
    frame_in,
    running_server,
    tensor_in,
)
from tuning_methods.sfprompt.device import SFPromptPaperDevice
from tuning_methods.sfprompt.device_deltas import DeltaBatch
from tuning_methods.sfprompt.server_deltas import read_cached

TOKENS, WIDTH = 1 + 4 + 4, 64  # class token, prompts, 2 x 2 patches

BYTES_PER_SAMPLE = TOKENS * WIDTH * 4  # in float32

SAMPLES, BATCH = 8, 4

MAX_OVERHEAD = 1100  # bytes of a request in addition to its rows: HTTP, header, padding, ids

DELTA_FIELDS = ("delta_smashed", "skip_below")  # of the method, not of the wire

QUANTISED = {"smashed": "int8", "delta_smashed": "int4"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    before = torch.get_num_threads()
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running
    torch.set_num_threads(before)


def store_of(server: RunningServer) -> SampleStore:
    store: SampleStore = server.server._application.services.samples
    return store


_keys = itertools.count()


def create_run(server: RunningServer, wire: dict[str, Any], **training: Any) -> str:
    plain = {"batch_size": BATCH, "keep_fraction": 1.0, "local_epochs": 0, "optimizer": "sgd"}
    rates = {"prompt_learning_rate": 0.05, "tail_learning_rate": 0.02, "schedule": "constant"}
    settings = RunPlan(
        seed=3,
        model=SMALL,
        federation=FederationSettings(rounds=1, evaluate_every=0),
        training=TrainingPlan.model_validate({**plain, **rates, **training}),
        wire=WirePlan.model_validate({k: v for k, v in wire.items() if k not in DELTA_FIELDS}),
        method={k: v for k, v in wire.items() if k in DELTA_FIELDS},
    )
    return server.operator().create(settings, key=f"delta-{next(_keys)}").id


class Device(SilentReporter):
    """Takes part in a whole run, and records each step of split training.

    Attributes:
        cache: the device's copies of smashed data; None: the run sends them whole.
        states: prompts and tail after each step.
        sent: smashed data of each request, and the batch of changes that was sent for it.
        missing: samples that the server did not have.
        differing: after each step, how many copies differed from the server's.
    """

    def __init__(
        self,
        server: RunningServer,
        folder: Path,
        wire: dict[str, Any],
        between: Callable[[Device, int], None] = lambda *_: None,
        **training: Any,
    ) -> None:
        self.store = store_of(server)
        self.states: list[dict[str, Tensor]] = []
        self.sent: list[tuple[Tensor, DeltaBatch]] = []
        self.missing: list[Sample] = []
        self.differing: list[int] = []
        self._between = between
        run = create_run(server, wire, **training)
        data = Dataset(image_set(SAMPLES), image_set(1))
        with contextlib.closing(Server(server.url)) as client:
            device = Participant(client, data, folder / run, "only", self)
            self.participant = device.join(run, key="join")
            self.owner = Owner(run, self.participant.id)
            self.initial = load_state(
                self.participant.files.fetch(self.participant.run.state, lambda _: b"")
            )
            method = self.participant._method
            assert isinstance(method, SFPromptPaperDevice)
            plan = self.participant.run.settings.plan
            self.cache = method.delta_cache(plan, device.cache_bytes)
            self._watch()
            self.participant.take_part()
            self.up = client.traffic().up[Phase.SMASHED]

    # Methods of a reporter

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase == "split":
            self.states.append(self.participant.model.state())
            self.differing.append(self._count_differing())
            self._between(self, done)

    # For tests

    def rows(self, part: str) -> int:
        """How many rows were sent as ``whole`` or ``changes``."""
        return sum(len(sent.tensors[part][0]) for _, sent in self.sent if part in sent.tensors)

    def _count_differing(self) -> int:
        cache = self.cache
        if cache is None:
            return 0
        ids = [bytes(id_.tolist()) for id_ in cache._ids(list(cache._copies))]
        assert len(ids) >= BATCH
        return sum(
            stored is None
            or read_cached(stored) != (copy.version, memoryview(copy.smashed.numpy().tobytes()))
            for stored, copy in zip(
                self.store.find(self.owner, ids), cache._copies.values(), strict=True
            )
        )

    def _watch(self) -> None:
        plane, cache = self.participant.samples.plane, self.cache
        if cache is None:
            return
        forward, encode = plane.forward_payload, cache.encode

        def recording_encode(samples: Sequence[Sample], smashed: Tensor) -> DeltaBatch:
            self.sent.append((smashed.clone(), encode(samples, smashed)))
            return self.sent[-1][1]

        def recording_forward(payload: Payload, samples: int, **step: Any) -> Tensor:
            _, batch = self.sent[-1]
            assert payload is batch.tensors
            try:
                return forward(payload, samples, **step)
            except SamplesMissing as error:
                self.missing += [batch.samples[place] for place in error.places]
                raise

        plane.forward_payload, cache.encode = recording_forward, recording_encode


def relative_error(tensor: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> float:
    value, expected = torch.as_tensor(tensor), torch.as_tensor(reference)
    return float((value - expected).norm() / expected.norm())


# Training


def test_float32_changes_train_like_whole_smashed_data(
    server: RunningServer, tmp_path: Path
) -> None:
    plain = Device(server, tmp_path, {}, split_epochs=4)
    delta = Device(server, tmp_path, {"delta_smashed": "float32"}, split_epochs=4)
    assert (delta.rows("whole"), delta.rows("changes")) == (SAMPLES, 3 * SAMPLES)
    assert len(plain.states) == len(delta.states) == 8
    for state, expected in zip(delta.states, plain.states, strict=True):
        for name, value in state.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    assert all(relative_error(sent.decoded, smashed) < 1e-6 for smashed, sent in delta.sent)
    assert relative_error(delta.states[-1]["prompts"], delta.initial["prompts"]) > 1e-3
    assert not any(delta.differing)


def test_the_error_of_int4_changes_does_not_grow_over_30_visits(
    server: RunningServer, tmp_path: Path
) -> None:
    device = Device(server, tmp_path, QUANTISED, split_epochs=30)
    errors = [relative_error(sent.decoded, smashed) for smashed, sent in device.sent]
    without_feedback = [
        relative_error(as_decoded(smashed, "int4"), smashed) for smashed, _ in device.sent
    ]
    visits = [max(errors[at : at + 2]) for at in range(0, 60, 2)]  # of two batches each
    assert len(visits) == 30
    assert max(errors) < 0.3 * min(without_feedback)
    assert max(visits[20:]) < 1.2 * max(visits[1:10])
    assert relative_error(device.states[-1]["prompts"], device.initial["prompts"]) > 1e-2
    assert not any(device.differing)


def test_for_unchanged_samples_only_ids_are_sent(server: RunningServer, tmp_path: Path) -> None:
    unchanged = {"prompt_learning_rate": 0.0, "split_epochs": 5}
    wire = {"delta_smashed": "float32", "skip_below": 1e-4}
    plain = Device(server, tmp_path, {}, **unchanged)
    delta = Device(server, tmp_path, wire, **unchanged)
    assert (delta.rows("whole"), delta.rows("changes")) == (SAMPLES, 0)
    assert plain.up > 5 * SAMPLES * BYTES_PER_SAMPLE
    assert (
        SAMPLES * BYTES_PER_SAMPLE
        < delta.up
        < SAMPLES * BYTES_PER_SAMPLE + len(delta.sent) * MAX_OVERHEAD
    )
    for name, value in delta.states[-1].items():
        torch.testing.assert_close(value, plain.states[-1][name], rtol=0, atol=1e-6, msg=name)


def test_an_int4_change_has_a_seventh_of_the_bytes_of_a_whole_sample(
    server: RunningServer, tmp_path: Path
) -> None:
    device = Device(server, tmp_path, {**QUANTISED, "smashed": "float32"}, split_epochs=8)
    change = TOKENS * (
        WIDTH // 2 + 2 * WIDTH // 64
    )  # half a byte for a value, 2 bytes for a group of 64
    rows = SAMPLES * BYTES_PER_SAMPLE + 7 * SAMPLES * change
    assert rows < device.up < rows + len(device.sent) * MAX_OVERHEAD


def test_a_skipped_sample_differs_by_less_than_the_threshold(
    server: RunningServer, tmp_path: Path
) -> None:
    device = Device(server, tmp_path, {**QUANTISED, "skip_below": 0.02}, split_epochs=10)
    assert 0 < device.rows("changes") < 9 * SAMPLES
    for smashed, sent in device.sent:
        for row in set(range(len(sent))) - set(sent.sent):
            assert relative_error(sent.decoded[row], smashed[row]) < 0.02
    assert not any(device.differing)


def test_a_server_that_loses_its_copies_requests_whole_samples(
    server: RunningServer, tmp_path: Path
) -> None:
    def lose(device: Device, done: int) -> None:
        if done == 6:
            device.store.drop(device.owner.run)

    device = Device(server, tmp_path, QUANTISED, lose, split_epochs=5)
    assert sorted(device.missing) == [(position, None) for position in range(SAMPLES)]
    assert device.rows("whole") == 2 * SAMPLES
    # After the next step the samples of the other batch are still missing.
    assert device.differing == [0, 0, 0, 0, 0, 0, BATCH, 0, 0, 0]


def test_a_device_without_its_copies_sends_whole_samples_again(
    server: RunningServer, tmp_path: Path
) -> None:
    def forget(device: Device, done: int) -> None:
        if done == 5:
            device.cache.forget([(0, None), (3, None)])

    device = Device(server, tmp_path, QUANTISED, forget, split_epochs=4)
    assert device.missing == []
    assert device.rows("whole") == SAMPLES + 2
    assert not any(device.differing)


def test_each_view_of_a_sample_has_its_own_copy(server: RunningServer, tmp_path: Path) -> None:
    device = Device(server, tmp_path, QUANTISED, split_epochs=6, augment=True, views=2)
    assert (device.rows("whole"), device.rows("changes")) == (2 * SAMPLES, 4 * SAMPLES)
    assert not any(device.differing)


@pytest.mark.parametrize("wire", [{"smashed": "int4"}, {**QUANTISED, "smashed": "int4"}])
def test_the_codec_s_error_corrects_the_gradient(
    server: RunningServer, tmp_path: Path, wire: dict[str, Any]
) -> None:
    """One step of SGD: the prompts also move by the gradient of the weighted codec error."""
    weight, rate = 0.5, 0.05
    one_step = {"split_epochs": 1, "batch_size": SAMPLES}
    without = Device(server, tmp_path, wire, **one_step)
    corrected = Device(server, tmp_path, {**wire, "gradient_correction": weight}, **one_step)
    model = device_model()
    with torch.no_grad():
        model.prompts.copy_(corrected.initial["prompts"])
    images, _ = read(corrected.participant.samples.train.images, range(SAMPLES))
    smashed = model.head(images, model.prompts)
    smashed.backward(weight * (smashed.detach() - as_decoded(smashed.detach(), "int4")))
    moved = corrected.states[0]["prompts"] - without.states[0]["prompts"]
    assert relative_error(moved, -rate * model.prompts.grad) < 1e-3


# Requests

IDS = [bytes([number] * 16) for number in range(2)]


def member(server: RunningServer, wire: dict[str, Any]) -> tuple[ApiClient, Owner]:
    """A participant in the first round of a new run."""
    run = create_run(server, wire)
    request = {"name": "a", "train_samples": 9, "test_samples": 1, "num_classes": 3}
    response = server.api().call("POST", f"/v1/runs/{run}/participants", key="join", json=request)
    assert response.is_success, response.text
    api = server.api(response.json()["credential"])
    api.assignment(run)
    return api, Owner(run, response.json()["participant"])


def random_smashed(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, TOKENS, WIDTH), generator=generator)


def forward(
    api: ApiClient,
    step: str,
    versions: list[list[int]],
    *,
    whole: dict[int, Tensor] | None = None,
    changes: dict[int, Tensor] | None = None,
) -> httpx.Response:
    """Send two samples, some rows whole and some as changes."""
    tensors = {
        "ids": torch.arange(2, dtype=torch.uint8)[:, None].expand(-1, 16),
        "versions": torch.tensor(versions),
    }
    for part, places, rows in (("whole", "whole_rows", whole), ("changes", "change_rows", changes)):
        if rows:
            tensors |= {part: torch.stack(list(rows.values())), places: torch.tensor(list(rows))}
    return api.ask("forward", {"step": step, "round": 1}, **tensors)


def begin(api: ApiClient, smashed: Tensor) -> httpx.Response:
    return forward(api, "s0", [[-1, 1], [-1, 1]], whole=dict(enumerate(smashed)))


def features_of(smashed: Tensor) -> Tensor:
    body = build_body(SMALL, open_backbone(files().backbone))
    with torch.no_grad():
        return body(smashed)


def test_a_repeated_request_is_applied_once_and_has_the_same_response(
    server: RunningServer,
) -> None:
    api, owner = member(server, {"delta_smashed": "float32"})
    start, change = random_smashed(0), random_smashed(1)
    assert torch.equal(tensor_in(begin(api, start), "features"), features_of(start))
    responses = [forward(api, "s1", [[1, 1], [1, 2]], changes={1: change[1]}) for _ in range(3)]
    assert all(response.content == responses[0].content for response in responses)
    expected = torch.stack([start[0], start[1] + change[1]])
    assert torch.equal(tensor_in(responses[0], "features"), features_of(expected))
    stored = store_of(server).find(owner, IDS)
    assert [sample and bytes(read_cached(sample)[1]) for sample in stored] == [
        row.numpy().tobytes() for row in expected
    ]
    returned = tensor_in(api.step("backward", random_smashed(2), "s1"), "gradients")
    assert torch.equal(
        returned, tensor_in(api.step("backward", random_smashed(2), "s1"), "gradients")
    )


def test_the_response_names_missing_copies(server: RunningServer) -> None:
    api, _ = member(server, {"delta_smashed": "float32"})
    start, other = random_smashed(0), random_smashed(1)
    assert begin(api, start).is_success
    response = forward(api, "s1", [[1, 1], [4, 5]], changes={1: other[1]})
    assert frame_in(response, "missing").tensor("places").tolist() == [1]
    response = forward(api, "s2", [[1, 1], [4, 6]], whole={1: other[1]})
    expected = features_of(torch.stack([start[0], other[1]]))
    assert torch.equal(tensor_in(response, "features"), expected)


def test_changes_are_refused_in_a_run_without_delta_smashed(server: RunningServer) -> None:
    api, _ = member(server, {})
    response = begin(api, random_smashed(0))
    assert code_of(response) == "invalid_field"
    assert response.json()["error"]["field"] == "delta_smashed"


def test_whole_smashed_data_are_always_accepted(server: RunningServer) -> None:
    api, _ = member(server, {"delta_smashed": "int4"})
    response = api.step("forward", random_smashed(0), "s0")
    assert torch.equal(tensor_in(response, "features"), features_of(random_smashed(0)))


def test_the_copies_of_a_device_that_leaves_are_deleted(server: RunningServer) -> None:
    api, owner = member(server, {"delta_smashed": "float32"})
    assert begin(api, random_smashed(0)).is_success
    assert all(store_of(server).find(owner, IDS))
    assert api.call("DELETE", f"/v1/runs/{owner.run}/participants/me", key="leave").is_success
    assert store_of(server).find(owner, IDS) == [None, None]
