"""What a device sends in a whole run: every field and tensor is on a list, and no label is."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from edge_client.data.dataset import Dataset
from edge_client.data.label_noise import with_noised_labels
from edge_client.participant import Participant, succeeded
from edge_client.storage.identity import device_secret
from edge_client.transport.client import Server
from protocol.frames import decode_frame
from protocol.settings import RunSettings
from tests.support.edge import CLASSES, Request, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer

STEP = {"step", "round"}
SESSION = {"session", "round", "attempt", "number", "steps"}
UPDATE = {"round", "attempt", "samples", "base", "session", "train_loss", "local_loss"}
LINEAR = {"tail.head.weight", "tail.head.bias"}
TAIL = {"tail.norm.weight", "tail.norm.bias", *LINEAR}

# By the last segment of the path: fields of the meta or the JSON, and all sets of tensors.
FEDERATION = {
    "participants": (
        {"name", "train_samples", "test_samples", "num_classes", "classes_sha256"}
        | {"shares_labels"},
        [set()],
    ),
    "evaluation": (
        {"round", "attempt", "samples", "correct", "loss_sum"}
        | {"selection_loss", "selection_samples", "predictions"},
        [set()],
    ),
}
CONTENT = {
    "default": {
        **FEDERATION,
        "missing": (set(), [{"ids"}]),
        "samples": (set(), [{"ids", "smashed"}]),
        "start": ({"round", "attempt"}, [{"ids"}]),
        "solve": ({"round", "attempt"}, [{"sums", "counts"}]),
        "infer": (STEP | {"state"}, [{"ids"}]),
        "update": (UPDATE, [LINEAR]),
    },
    "prompts": {
        **FEDERATION,
        "missing": (set(), [{"ids"}]),
        "samples": (set(), [{"ids", "smashed"}]),
        "start": ({"round", "attempt"}, [{"ids"}]),
        "solve": ({"round", "attempt"}, [{"sums", "counts"}]),
        "exchange": (SESSION, [{"ids"}, {"ids", "gradients"}, {"gradients"}]),
        "infer": (STEP | {"state"}, [{"ids"}]),
        "update": (UPDATE, [LINEAR]),
    },
    "paper": {
        **FEDERATION,
        "forward": (STEP, [{"smashed"}]),
        "backward": (STEP, [{"gradients"}]),
        "infer": (STEP | {"state"}, [{"smashed"}]),
        "update": (UPDATE, [TAIL | {"prompts"}]),
    },
}

QUERIES = {"assignment": {"task", "round", "attempt", "wait"}, "delta": {"base"}}

HEADERS = {
    *("host", "user-agent", "accept-encoding", "content-type", "content-length", "range"),
    *("authorization", "sfprompt-version", "x-request-id", "idempotency-key"),
    "sfprompt-checksum",
}

# What follows from labels: gradients, tuned tensors, losses, correct answers, hashes of states.
FOLLOWS = {
    "default": {
        *("solve.sums", "solve.counts"),
        *(f"update.{name}" for name in LINEAR),
        *("update.base", "update.train_loss", "update.local_loss"),
        *("evaluation.correct", "evaluation.loss_sum", "evaluation.selection_loss"),
        "evaluation.predictions",
        "infer.state",
    },
    "prompts": {
        *("solve.sums", "solve.counts", "exchange.gradients"),
        *(f"update.{name}" for name in LINEAR),
        *("update.base", "update.train_loss", "evaluation.correct", "evaluation.loss_sum"),
        *("evaluation.predictions", "evaluation.selection_loss", "infer.state"),
    },
    # The device tunes the prompts in its head, so that smashed data change with them.
    "paper": {
        *("forward.smashed", "backward.gradients", "infer.smashed", "infer.state"),
        *(f"update.{name}" for name in {*TAIL, "prompts"}),
        *("update.train_loss", "update.local_loss"),
        *("evaluation.correct", "evaluation.loss_sum", "evaluation.predictions"),
    },
}

DATA = Dataset(image_set(12), image_set(3, seed=1))

METHODS = {
    "default": {"name": "sfprompt"},
    "prompts": {"name": "sfprompt", "prompt_count": 2},
    "paper": {"name": "sfprompt-paper", "prompt_count": 2},
}


@dataclass
class RecordingTransport(httpx.BaseTransport):
    """Records each request of a device, and passes it on."""

    inner: httpx.BaseTransport
    requests: list[Request] = field(default_factory=list)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        body = b"".join(request.stream)
        target = request.url.raw_path.decode()
        self.requests.append(Request(request.method, target, dict(request.headers), body))
        return self.inner.handle_request(request)

    def traffic(self) -> object:
        return self.inner.traffic()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Content:
    """A request's content, decoded from its bytes."""

    kind: str  # the last segment of the path
    fields: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, request: Request) -> Content:
        kind = request.target.partition("?")[0].rsplit("/", 1)[-1]
        if request.headers.get("content-type") == "application/json":
            return cls(kind, json.loads(request.body), {})
        frame = decode_frame(request.body)
        assert frame.kind == kind
        return cls(kind, frame.meta, frame.tensors())

    def parts(self) -> dict[str, object]:
        """Return all values by KIND.NAME, without the random part of names."""
        values = {
            name: str(value).partition(".")[2] if name in ("step", "session") else value
            for name, value in self.fields.items()
        }
        tensors = {name: tensor.tolist() for name, tensor in self.tensors.items()}
        return {f"{self.kind}.{name}": value for name, value in (values | tensors).items()}


def contents_of(requests: list[Request]) -> list[Content]:
    return [Content.of(request) for request in requests if request.body]


def record(
    server: RunningServer,
    home: Path,
    method: Mapping[str, object],
    data: Dataset,
    rounds: int = 2,
    training: Mapping[str, object] | None = None,
) -> list[Request]:
    """Take part in a run as its only device, and return all requests."""
    settings = RunSettings.model_validate(
        {
            "model": {
                "backbone": "test_vit",
                "weights": "random:0",
                "image_size": 32,
                "num_classes": len(CLASSES),
            },
            "federation": {"rounds": rounds},
            "method": method,
            "training": training or {},
        }
    )
    run = server.operator().create(settings, key=uuid.uuid4().hex).id
    with closing(Server(server.url)) as client:
        client._transport = recorder = RecordingTransport(client._transport)  # type: ignore
        joined = Participant(client, data, home, "device", SilentReporter()).join(run, "join")
        assert succeeded(joined.take_part())
    return recorder.requests


def exchanged(data: Dataset) -> Dataset:
    """The data with the labels of the first two training samples exchanged."""
    labels = data.train.labels.copy()
    labels[:2] = labels[:2][::-1]
    assert not np.array_equal(labels, data.train.labels)
    return Dataset(replace(data.train, labels=labels), data.test)


def relabelled(data: Dataset) -> Dataset:
    """The data with another label for the first training sample, so that the counts differ."""
    labels = data.train.labels.copy()
    labels[0] = (labels[0] + 1) % len(CLASSES)
    return Dataset(replace(data.train, labels=labels), data.test)


@dataclass(frozen=True)
class Recording:
    """The requests of a run, and of the same run with other labels.

    In the paper's form two labels are exchanged: it selects a share of each class.
    """

    form: str
    plain: list[Request]
    exchanged: list[Request]


@pytest.fixture(scope="module", params=list(METHODS))
def recording(
    request: pytest.FixtureRequest, server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Recording:
    form, home = request.param, tmp_path_factory.mktemp("home")
    other = exchanged(DATA) if form == "paper" else relabelled(DATA)
    runs = [record(server, home, METHODS[form], data) for data in (DATA, other)]
    return Recording(form, *runs)


def test_a_device_sends_listed_fields_and_tensors_only(recording: Recording) -> None:
    seen = set()
    for request in recording.plain:
        assert set(request.headers) <= HEADERS
        path, _, query = request.target.partition("?")
        keys = set(httpx.QueryParams(query))
        assert keys <= QUERIES.get(path.rsplit("/", 1)[-1], set()), request.target
        if not request.body:
            assert request.method == "GET"
            continue
        content = Content.of(request)
        fields, tensors = CONTENT[recording.form][content.kind]
        assert set(content.fields) == fields
        assert set(content.tensors) in tensors
        seen.add(content.kind)
    assert seen == set(CONTENT[recording.form])  # the run has used all of them


def test_other_labels_change_what_follows_from_them_only(recording: Recording) -> None:
    plain, other = contents_of(recording.plain), contents_of(recording.exchanged)
    assert [content.kind for content in plain] == [content.kind for content in other]
    changed = set()
    for before, after in zip(plain, other, strict=True):
        old, new = before.parts(), after.parts()
        assert list(old) == list(new)
        changed |= {name for name in old if old[name] != new[name]}
    assert changed <= FOLLOWS[recording.form]
    used = {"solve.sums", "exchange.gradients", "backward.gradients"}
    assert changed & used, "the labels were not used"


@pytest.mark.parametrize("form", list(METHODS))
def test_what_a_device_sends_follows_from_its_noised_labels_alone(
    form: str, server: RunningServer, tmp_path: Path
) -> None:
    epsilon, labels = 1.0, DATA.train.labels
    other = Dataset(replace(DATA.train, labels=(labels + 1) % len(CLASSES)), DATA.test)
    secret = device_secret(tmp_path)
    noised = [with_noised_labels(data, epsilon, secret).train.labels for data in (DATA, other)]
    mixed = np.where(noised[0] == noised[1], other.train.labels, labels)
    assert not np.array_equal(mixed, labels)
    data = Dataset(replace(DATA.train, labels=mixed), DATA.test)
    private = {"labels": f"noised:{epsilon}"}
    plain, changed = (
        contents_of(record(server, tmp_path, METHODS[form], each, training=private))
        for each in (DATA, data)
    )
    assert [content.parts() for content in plain] == [content.parts() for content in changed]
    public = contents_of(record(server, tmp_path, METHODS[form], DATA))
    assert [content.parts() for content in plain] != [content.parts() for content in public]


def test_the_papers_form_sends_the_same_smashed_data_until_gradients_tune_the_prompts(
    server: RunningServer, tmp_path: Path
) -> None:
    """Without scores and local update, which use the labels, nothing differs before that."""
    method = {"name": "sfprompt-paper", "prompt_count": 2, "local_epochs": 0, "pruning": "random"}
    first = []
    for data in (DATA, exchanged(DATA)):
        sent = contents_of(record(server, tmp_path, method, data, rounds=1))
        first.append(next(content for content in sent if content.kind == "forward"))
    assert first[0].parts() == first[1].parts()
