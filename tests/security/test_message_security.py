"""Frames, JSON and paths that are forged or damaged, and replayed messages."""

from __future__ import annotations

import struct
import threading

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from protocol.frames import encode_frame, join_frame
from protocol.messages import Task
from tests.support.federation import run_settings, smashed, state_of, step_frame, update_frame
from tests.support.server import ApiClient, RunningServer, code_of, tensor_in


@pytest.mark.parametrize(
    "meta",
    [
        {"step": "s", "round": 1, "participant": "p0002"},
        {"step": "s", "round": 1, "run": "r0"},
        {"step": "s" * 65, "round": 1},
        {"step": "../../etc", "round": 1},
        {"step": "", "round": 1},
        {"step": "s", "round": -1},
        {"step": "s", "round": 2**60},
        {"step": "s", "round": "1e400"},
        {"round": 1},
    ],
)
def test_a_frame_with_an_identity_or_an_invalid_step_is_refused(
    member: ApiClient, meta: dict[str, object]
) -> None:
    """Tried: a frame names another participant or run, a path as its step, or a round beyond all
    bounds. Stopped by: identity comes from the credential; a closed set of fields."""
    frame = step_frame("infer", smashed(), **{"step": "x", **meta}, round_=1)  # type: ignore[arg-type]
    if "step" not in meta:
        frame = step_frame("infer", smashed(), step=None)  # type: ignore[arg-type]
    response = member.call("POST", "/v1/split/infer", content=frame)
    assert response.status_code in (400, 413, 422)


def split_frame(kind: str) -> bytes:
    """A valid frame of a kind that refers to stored samples."""
    ids = (torch.ones(1, 16, dtype=torch.uint8), "uint8")
    rows = (smashed(batch=1)[:, :5], "float32")
    meta = {"session": "s", "round": 1, "attempt": 0, "number": 0, "steps": 1}
    pieces = {
        "samples": lambda: encode_frame("samples", {}, {"ids": ids, "smashed": rows}),
        "missing": lambda: encode_frame("missing", {}, {"ids": ids}),
        "exchange": lambda: encode_frame("exchange", meta, {"ids": ids}),
    }
    return bytes(join_frame(pieces[kind]()))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    noise=st.binary(max_size=100),
    place=st.integers(0, 400),
    kind=st.sampled_from(["samples", "missing", "exchange"]),
)
def test_a_damaged_frame_about_samples_is_refused_without_an_internal_error(
    cut_member: ApiClient, noise: bytes, place: int, kind: str
) -> None:
    """Tried: frames about stored samples with random damage. Stopped by: typed refusals, never a
    failure of the server."""
    frame = bytearray(split_frame(kind))
    frame[place : place + len(noise)] = noise
    response = cut_member.call("POST", f"/v1/split/{kind}", content=bytes(frame))
    if response.is_error:
        assert response.status_code < 500, response.text
        assert code_of(response)


def test_samples_are_stored_after_damaged_frames(cut_member: ApiClient) -> None:
    """Tried: the damaged frames of the test before, to leave the store broken. Stopped by: a frame
    is decoded whole before it changes anything."""
    for kind in ("samples", "missing", "exchange"):
        response = cut_member.call("POST", f"/v1/split/{kind}", content=split_frame(kind))
        assert response.is_success, response.text
    assert tensor_in(response, "features").shape == (1, 7, 192)


def raw_frame(header: object, payload: bytes = b"") -> bytes:
    packed: bytes = msgpack.packb(header)
    body = packed + bytes(-(28 + len(packed)) % 64) + payload
    prefix = struct.pack("<4sHHIQ", b"SFPF", 2, 0, len(packed), 28 + len(body))
    return prefix + struct.pack("<Q", xxh3_64_intdigest(prefix + body)) + body


@pytest.mark.parametrize(
    "tensors",
    [
        [{"name": "smashed", "codec": "float32", "shape": [2**40], "sizes": [2**42]}],
        [{"name": "smashed", "codec": "float32", "shape": [2**62, 4], "sizes": [0]}],
        [{"name": "smashed", "codec": "pickle", "shape": [1], "sizes": [64]}],
        [{"name": "smashed", "codec": "int64", "shape": [1, 1, 8], "sizes": [64]}],
        [{"name": "smashed", "codec": "float32", "shape": [-1], "sizes": [64]}],
        [{"name": "smashed", "codec": "float32", "shape": [], "sizes": [4]}],
        [],
    ],
)
def test_forged_tensor_headers_are_refused(
    member: ApiClient, tensors: list[dict[str, object]]
) -> None:
    """Tried: tensors of 2^40 numbers, negative sides, the codec pickle. Stopped by: known codecs,
    bounded shapes, sizes that agree."""
    header = {"kind": "infer", "meta": {"step": "s", "round": 1}, "tensors": tensors}
    response = member.call("POST", "/v1/split/infer", content=raw_frame(header, bytes(64)))
    assert response.status_code in (400, 413, 415, 422), response.text


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"round": NaN, "attempt": 0, "samples": 1, "correct": 1, "loss_sum": 1}',
        b'{"round": 1, "attempt": 0, "samples": 1, "correct": 1, "loss_sum": Infinity}',
        b'{"round": 1, "attempt": 0, "samples": 1, "correct": 2, "loss_sum": 1}',
        b'{"round": 1' + b"0" * 5000 + b"}",
        b"\xff\xfe",
        b"null",
        b"",
    ],
)
def test_invalid_json_is_refused(member: ApiClient, run: str, body: bytes) -> None:
    """Tried: deeply nested JSON, NaN, more right answers than samples, numbers of 5,000 digits.
    Stopped by: a bounded parser and the bounds of each field."""
    response = member.call("PUT", f"/v1/runs/{run}/evaluation", key="k", content=body)
    assert (response.status_code, code_of(response)) == (422, "invalid_field"), response.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/runs/{run}/states/../../secret/state",
        "/v1/runs/{run}/states/%2e%2e%2f%2e%2e%2fsecret/state",
        "/v1/runs/..%2f..%2fsecret/head",
        "/v1/runs/{run}%00/head",
    ],
)
def test_a_path_cannot_leave_the_data_folder(server: RunningServer, run: str, path: str) -> None:
    """Tried: paths that lead out of the data folder, also in other spellings. Stopped by: files are
    named by hashes; runs by known ids."""
    response = server.operator().call("GET", path.format(run=run))
    assert code_of(response) in ("not_found", "invalid_field")


def test_a_captured_update_cannot_be_replayed_into_another_round(
    server: RunningServer, member: ApiClient
) -> None:
    """Tried: an update is sent again under other keys, to another round, by another device. Stopped
    by: round, attempt and credential are part of it."""
    operator = server.operator()
    run = operator.create(run_settings(evaluate_every=0, rounds=3), key="replay").id
    api = server.api(server.api().join(run).credential)
    captured = update_frame(state_of(1.0), {"round": 1, "attempt": 0, "samples": 10})
    path = f"/v1/runs/{run}/update"
    first = api.call("PUT", path, key="k", content=captured)
    assert first.is_success
    assert api.call("PUT", path, key="k", content=captured).content == first.content
    assert code_of(api.call("PUT", path, key="k2", content=captured)) == "stale_round"
    assert code_of(member.call("PUT", path, key="k3", content=captured)) == "forbidden"
    assert api.assignment(run).round == 2


def test_concurrent_updates_of_one_participant_count_once(server: RunningServer) -> None:
    """Tried: eight updates at once, to count several times. Stopped by: one transaction and
    idempotency keys."""
    operator = server.operator()
    run = operator.create(run_settings(rounds=1, evaluate_every=0, min_participants=2), key="r").id
    credential = server.api().join(run).credential
    server.api().join(run, "b")
    statuses: list[int] = []

    def send(number: int) -> None:
        api = ApiClient(server.url, credential)
        statuses.append(api.update(run, state_of(1.0), f"k{number % 2}").status_code)
        api.close()

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 200, 200, 200, 409, 409, 409, 409]
    kinds = [event["kind"] for event in operator.call("GET", f"/v1/runs/{run}/events").json()]
    assert kinds.count("update_counted") == 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    noise=st.binary(max_size=300),
    place=st.integers(0, 400),
    kind=st.sampled_from(["infer", "update"]),
)
def test_a_damaged_frame_is_refused_without_an_internal_error(
    server: RunningServer, run: str, member: ApiClient, noise: bytes, place: int, kind: str
) -> None:
    """Tried: steps and updates with random damage. Stopped by: typed refusals, never a failure of
    the server."""
    if kind == "infer":
        method, path = "POST", "/v1/split/infer"
        frame = bytearray(step_frame("infer", smashed(batch=1), "s"))
    else:
        method, path = "PUT", f"/v1/runs/{run}/update"
        frame = bytearray(update_frame(state_of(0.0), {"round": 9, "attempt": 0, "samples": 1}))
    frame[place : place + len(noise)] = noise
    response = member.call(method, path, key="fuzz", content=bytes(frame))
    if response.is_error:
        assert response.status_code < 500, response.text
        assert code_of(response)


def test_the_server_still_works_after_these_tests(
    server: RunningServer, run: str, member: ApiClient
) -> None:
    """Tried: everything in this file, to leave the server broken. Stopped by: nothing of it changes
    a run."""
    assert member.assignment(run).task is Task.TRAIN
    assert member.step("forward", smashed(), "end").is_success
    assert member.step("backward", torch.ones_like(smashed()), "end").is_success
