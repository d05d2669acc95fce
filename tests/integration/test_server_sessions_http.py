"""Sessions with prompts at the cut over HTTP, and the server's cache of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from protocol.frames import encode_frame, join_frame
from protocol.messages import BlobRef, Task
from protocol.plan import ModelPlan
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.export import load_exported
from split_model.parts.body import Body
from split_model.parts.build import build_body
from split_server.federation.export import export_run
from split_server.storage.database import RunRow, Store
from split_server.storage.run_files import RunFiles
from tests.support.federation import WIDTH, run_settings, smashed
from tests.support.samples import sample_ids
from tests.support.server import (
    ApiClient,
    RunningServer,
    code_of,
    frame_in,
    joined,
    new_run,
    running_server,
    tensor_in,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def operator(server: RunningServer) -> ApiClient:
    return server.operator()


def exchange(number: int, steps: int = 2, session: str = "s", attempt: int = 0) -> dict[str, Any]:
    return {
        "session": session,
        "round": 1,
        "attempt": attempt,
        "number": number,
        "steps": steps,
    }


def body_of(server: RunningServer, split: ModelPlan) -> Body:
    folder = server.server._application.settings.data_dir
    path = next(folder.rglob("vit_tiny*.safetensors"))
    return build_body(split, open_backbone(path))


def test_a_round_with_prompts_at_the_cut(
    server: RunningServer, operator: ApiClient, tmp_path: Path
) -> None:
    wire = {"keep_smashed": True, "pooled_features": True}
    settings = run_settings(prompt_at="cut", wire=wire, rounds=1)
    run = operator.create(settings, key="cut").id
    api = joined(server, run)
    assigned = api.assignment(run)
    folder = server.server._application.settings.data_dir
    start, _ = newest(folder, run)

    # Smashed data are sent once.
    ids, rows = sample_ids(1, 2), smashed(batch=2)[:, :5]
    named = {"ids": ids}
    assert tensor_of(api.ask("missing", {}, **named), "missing", "places").tolist() == [0, 1]
    assert not frame_in(api.ask("samples", {}, ids=ids, smashed=rows), "kept").specs
    assert tensor_of(api.ask("missing", {}, **named), "missing", "places").tolist() == []

    # Two batches, and the prompts are those of a plain loop.
    body = body_of(server, settings.model)
    prompts = start["prompts"].clone().requires_grad_()
    optimizer = torch.optim.AdamW([prompts], lr=0.005, weight_decay=0.0)
    gradients = smashed(seed=1)[:, :1]
    sent: dict[str, Tensor] = {}
    for number, factor in ((0, 1.0), (1, 0.5 * (1 + math.cos(math.pi / 2)))):
        expected = body(rows, prompts)[:, :1]
        features = tensor_in(api.ask("exchange", exchange(number), **sent, **named), "features")
        torch.testing.assert_close(features, expected.detach())
        optimizer.param_groups[0]["lr"] = 0.005 * factor
        optimizer.zero_grad()
        expected.backward(gradients)
        optimizer.step()
        sent = {"gradients": gradients}
    assert not frame_in(api.ask("exchange", exchange(2), **sent), "features").specs

    # The device's part of the update is the tail alone.
    tail = {name: tensor for name, tensor in start.items() if name != "prompts"}
    assert code_of(api.update(run, tail, "u")) == "invalid_field"
    assert code_of(api.update(run, tail, "u", session="other")) == "step_lost"
    assert api.update(run, tail, "u", session="s").is_success
    assert api.update(run, tail, "u", session="s").is_success  # though the session is over
    after, state = newest(folder, run)
    torch.testing.assert_close(after["prompts"], prompts.detach())
    assert not torch.equal(after["prompts"], start["prompts"])
    assert state.nbytes == assigned.state.nbytes

    # The new prompts are there for those who measure them.
    inferred = tensor_in(api.ask("infer", {"step": "i", "round": 1}, **named), "features")
    torch.testing.assert_close(inferred, body(rows, prompts)[:, :1].detach())
    export_run(folder, run, tmp_path / "model.safetensors")
    model = load_exported(tmp_path / "model.safetensors")
    torch.testing.assert_close(model.get_buffer("prompts"), prompts.detach())


def newest(folder: Path, run: str) -> tuple[dict[str, Tensor], BlobRef]:
    """The newest global state with its prompts, and what devices download of it."""
    store = Store(folder / "server.sqlite")
    try:
        with store.reading() as session:
            refs = session.get_one(RunRow, run).state
    finally:
        store.close()
    return RunFiles(folder / "runs" / run).read_state(refs), refs.device


def tensor_of(answer: httpx.Response, kind: str, name: str) -> Tensor:
    return frame_in(answer, kind).tensor(name)


def test_missing_samples_are_reported_and_nothing_else_happens(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, prompt_at="cut", wire={"keep_smashed": True}, min_participants=2)
    a, b = joined(server, run, "a"), joined(server, run, "b")
    rows = smashed(batch=2)[:, :5]
    assert a.ask("samples", {}, ids=sample_ids(1, 2), smashed=rows).is_success
    named = {"ids": sample_ids(1, 3, 2, 4)}
    for _ in range(2):
        answer = a.ask("exchange", exchange(0), **named)
        assert tensor_of(answer, "missing", "places").tolist() == [1, 3]
    answer = a.ask("infer", {"step": "i", "round": 1}, **named)
    assert tensor_of(answer, "missing", "places").tolist() == [1, 3]
    assert a.ask("samples", {}, ids=sample_ids(3, 4), smashed=rows).is_success
    features = tensor_in(a.ask("exchange", exchange(0), **named), "features")
    again = tensor_in(a.ask("infer", {"step": "i", "round": 1}, smashed=rows), "features")
    torch.testing.assert_close(features[::2], again)  # samples 1 and 2 have the rows 0 and 1
    # Nobody has another's samples, not even under the same ids.
    answer = b.ask("missing", {}, ids=sample_ids(1, 2))
    assert tensor_of(answer, "missing", "places").tolist() == [0, 1]
    assert a.call("DELETE", f"/v1/runs/{run}/samples").json() == {}
    answer = a.ask("missing", {}, ids=sample_ids(1, 2, 3, 4))
    assert tensor_of(answer, "missing", "places").tolist() == [0, 1, 2, 3]


def test_samples_are_dropped_with_their_participant_and_run(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, prompt_at="cut", wire={"keep_smashed": True}, min_participants=3)
    a, b = joined(server, run, "a"), joined(server, run, "b")
    store = server.server._application.services.samples
    rows = smashed(batch=2)[:, :5]
    for api in (a, b):
        assert api.ask("samples", {}, ids=sample_ids(1, 2), smashed=rows).is_success
    before = store.memory_bytes
    assert a.call("DELETE", f"/v1/runs/{run}/participants/me", key="k").is_success
    assert before - store.memory_bytes == 2 * 5 * WIDTH * 4
    assert operator.call("POST", f"/v1/runs/{run}/cancel", key="k").is_success
    assert before - store.memory_bytes == 2 * 2 * 5 * WIDTH * 4


def test_the_prompt_placement_decides_which_requests_are_valid(
    server: RunningServer, operator: ApiClient
) -> None:
    at_input, at_cut = new_run(operator), new_run(operator, prompt_at="cut")
    device, other = joined(server, at_input), joined(server, at_cut)
    rows = smashed()[:, :5]
    for api in (device, other):
        api.assignment(at_input if api is device else at_cut)
        for kind, tensors in (("samples", {"smashed": rows}), ("missing", {})):
            answer = api.ask(kind, {}, ids=sample_ids(1, 2), **tensors)
            assert answer.json()["error"]["field"] == "keep_smashed"
        answer = api.ask("infer", {"step": "s", "round": 1}, ids=sample_ids(1))
        assert answer.json()["error"]["field"] == "keep_smashed"
    answer = device.ask("exchange", exchange(0), smashed=smashed())
    assert answer.json()["error"]["field"] == "prompt_at"
    for kind in ("forward", "backward"):
        answer = other.step(kind, rows, "s")
        assert answer.json()["error"]["field"] == "prompt_at"
    assert other.ask("exchange", exchange(0), smashed=rows).is_success  # ids are not a must


def test_an_invalid_exchange_is_refused(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator, prompt_at="cut", wire={"keep_smashed": True})
    api = joined(server, run)
    api.assignment(run)
    rows, ids, features = smashed()[:, :5], sample_ids(1, 2), smashed()
    assert api.ask("samples", {}, ids=ids, smashed=rows).is_success
    for meta, tensors, code in (
        (exchange(3), {"gradients": features}, "invalid_field"),
        (exchange(0, attempt=1), {"smashed": rows}, "stale_round"),
        ({**exchange(0), "round": 2}, {"smashed": rows}, "stale_round"),
        (exchange(0), {}, "malformed_frame"),
        (exchange(0), {"smashed": rows, "gradients": features}, "malformed_frame"),
        (exchange(0), {"smashed": rows, "ids": ids}, "malformed_frame"),
        (exchange(2), {"gradients": features, "ids": ids}, "malformed_frame"),
        (exchange(1), {"ids": ids}, "malformed_frame"),
        (exchange(0), {"ids": ids[:, :15].contiguous()}, "malformed_frame"),
        (exchange(0), {"ids": ids.long()}, "malformed_frame"),
        (exchange(0), {"ids": sample_ids(*[1] * 9)}, "invalid_field"),
        (exchange(0), {"smashed": smashed()}, "wrong_shape"),
        (exchange(0), {"smashed": rows * float("nan")}, "non_finite"),
        (exchange(1), {"gradients": features, "ids": ids}, "step_lost"),
    ):
        answer = api.ask("exchange", meta, **tensors)
        assert code_of(answer) == code, (meta, answer.text)
    first = api.ask("exchange", exchange(0), ids=ids)
    assert first.content == api.ask("exchange", exchange(0), ids=ids).content
    assert code_of(api.ask("exchange", exchange(0), smashed=rows)) == "idempotency_key_reused"
    for tensors, code in (
        ({"gradients": features[:, :5].contiguous(), "ids": ids}, "wrong_shape"),
        ({"gradients": features[:1], "ids": ids}, "wrong_shape"),
    ):
        assert code_of(api.ask("exchange", exchange(1), **tensors)) == code
    assert api.ask("exchange", exchange(1), gradients=features, ids=ids).is_success


def test_compressed_ids_are_refused(server: RunningServer, operator: ApiClient) -> None:
    """Compressed, they would be other bytes, and as many as the sender likes."""
    run = new_run(operator, prompt_at="cut", wire={"keep_smashed": True}, min_participants=2)
    api = joined(server, run)
    for ids in (sample_ids(1, 2), sample_ids(*[1] * 4096)):
        pieces = encode_frame("missing", {}, {"ids": (ids, "uint8+zstd")})
        answer = api.call("POST", "/v1/split/missing", content=bytes(join_frame(pieces)))
        assert code_of(answer) == "malformed_frame"


def test_samples_that_cannot_be_cached_are_refused(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, prompt_at="cut", wire={"keep_smashed": True}, min_participants=2)
    api = joined(server, run)
    rows, ids = smashed()[:, :5].contiguous(), sample_ids(1, 2)
    for tensors, code in (
        ({"ids": ids}, "malformed_frame"),
        ({"smashed": rows}, "malformed_frame"),
        ({"ids": ids[:1], "smashed": rows}, "malformed_frame"),
        ({"ids": ids[:1], "smashed": rows * float("inf")}, "malformed_frame"),
        ({"ids": ids, "smashed": rows[0, 0, 0]}, "malformed_frame"),
        ({"ids": ids, "smashed": smashed()}, "wrong_shape"),
        ({"ids": ids, "smashed": rows * float("inf")}, "non_finite"),
        ({"ids": ids, "smashed": rows.long()}, "invalid_field"),
    ):
        assert code_of(api.ask("samples", {}, **tensors)) == code
    assert code_of(api.ask("samples", {"round": 1}, ids=ids, smashed=rows)) == "invalid_field"
    answer = api.ask("missing", {}, ids=ids)
    assert tensor_of(answer, "missing", "places").tolist() == [0, 1]


def test_an_inference_by_ids_carries_no_smashed_data(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, prompt_at="cut", wire={"keep_smashed": True}, min_participants=2)
    api = joined(server, run)
    rows, ids = smashed()[:, :5].contiguous(), sample_ids(1, 2)
    assert api.ask("samples", {}, ids=ids, smashed=rows).is_success
    meta = {"step": "s", "round": 1}
    assert code_of(api.ask("infer", meta, ids=ids, smashed=rows)) == "malformed_frame"
    assert api.ask("infer", meta, ids=ids).content == api.ask("infer", meta, smashed=rows).content


@pytest.mark.parametrize("codec", ["klt:0.5", "pq", "svd:0.9+zstd"])
def test_samples_encoded_together_are_cached_one_by_one(
    server: RunningServer, operator: ApiClient, codec: str
) -> None:
    wire = {"keep_smashed": True, "smashed": codec}
    api = joined(server, new_run(operator, prompt_at="cut", wire=wire, min_participants=2))
    rows, ids = smashed(batch=6)[:, :5].contiguous(), sample_ids(*range(6))
    pieces = encode_frame("samples", {}, {"ids": (ids, "uint8"), "smashed": (rows, codec)})
    answer = api.call("POST", "/v1/split/samples", content=bytes(join_frame(pieces)))
    assert answer.is_success
    cached = as_decoded(as_decoded(rows, codec), "int8")[[4, 1]]
    meta = {"step": "s", "round": 1}
    by_id = api.ask("infer", meta, ids=ids[[4, 1]])
    assert by_id.is_success
    assert by_id.content == api.ask("infer", meta, smashed=cached).content


def test_an_update_of_no_sample_names_no_session(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, prompt_at="cut", max_repeats=0)
    api = joined(server, run)
    assigned = api.assignment(run)
    path = f"/v1/runs/{run}/states/{assigned.state.sha256}/state"
    tail = safetensors.torch.load(api.call("GET", path).content)
    assert code_of(api.update(run, tail, "u", samples=0)) == "empty_update"
    assert api.assignment(run).task is Task.STOP
