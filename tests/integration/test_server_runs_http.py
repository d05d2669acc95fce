"""The server over real HTTP: runs, their participants and their rounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from protocol.messages import Results, RunStatus, RunView, Task
from protocol.wire import PROTOCOL_VERSION, VERSION_HEADER
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.export import load_exported
from split_model.parts.build import build_body
from split_server.federation import advance, transitions
from split_server.federation.export import export_run
from tests.support.federation import (
    OPERATOR,
    SPLIT,
    TOKENS,
    WIDTH,
    run_settings,
    smashed,
    state_of,
    step_frame,
)
from tests.support.server import (
    ApiClient,
    RunningServer,
    code_of,
    joined,
    new_run,
    running_server,
    tensor_in,
    wait_until,
)
from tests.support.settings import custom_settings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def operator(server: RunningServer) -> ApiClient:
    return server.operator()


_keys = iter(range(10**6))


def test_health_needs_no_credential_or_version(server: RunningServer) -> None:
    answer = server.api().call("GET", "/v1/health", headers={VERSION_HEADER: "99"})
    said = answer.json()
    assert said["status"] == "ok"
    assert (said["version"], said["device"], said["dtype"]) == (PROTOCOL_VERSION, "cpu", "float32")


def test_a_whole_run_over_http(server: RunningServer, operator: ApiClient, tmp_path: Path) -> None:
    run = new_run(operator, rounds=1, min_participants=2)
    a, b = joined(server, run, "a"), joined(server, run, "b")
    assigned = a.assignment(run)
    assert (assigned.task, assigned.round) == (Task.TRAIN, 1)
    weights = operator.http.get(f"/v1/runs/{run}/states/{assigned.state.sha256}/state")
    assert len(weights.content) == assigned.state.nbytes

    features = tensor_in(a.step("forward", smashed(), "s1"), "features")
    gradient = tensor_in(a.step("backward", smashed(seed=1), "s1"), "gradients")
    body_path = next(server_folder(server).rglob("vit_tiny*.safetensors"))
    body = build_body(SPLIT, open_backbone(body_path))
    leaf = smashed().requires_grad_(True)
    expected = body(leaf)
    expected.backward(smashed(seed=1))
    assert torch.equal(features, expected)
    assert torch.equal(gradient, leaf.grad)  # type: ignore[arg-type]

    for api, value in ((a, 1.0), (b, 3.0)):
        receipt = api.update(run, state_of(value), "u", samples=10, train_loss=0.5)
        assert receipt.json() == {"round": 1, "samples": 10}
        assert (
            receipt.json()
            == api.update(run, state_of(value), "u", samples=10, train_loss=0.5).json()
        )
    for api in (a, b):
        assert api.assignment(run).task is Task.EVALUATE
        assert api.evaluate(run, "e", correct=7).json() == {}
    stop = a.assignment(run)
    assert (stop.task, stop.status) == (Task.STOP, RunStatus.FINISHED)
    results = Results.model_validate(operator.call("GET", f"/v1/runs/{run}/results").json())
    assert results.rounds[0].accuracy == 0.7
    assert tensor_in(a.step("infer", smashed(), "later"), "features").shape == (2, TOKENS, WIDTH)

    out = tmp_path / "model.safetensors"
    export_run(server_folder(server), run, out)
    model = load_exported(out)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert float(model.get_buffer("prompts").mean()) == 2.0


def server_folder(server: RunningServer) -> Path:
    return server.server._application.settings.data_dir


def test_a_run_of_unavailable_parts_is_refused(operator: ApiClient) -> None:
    settings = run_settings().model_dump(mode="json")
    for change, field in (
        ({"backbone": "no_such_model"}, "model.backbone"),
        ({"backbone": "resnet18"}, "model.backbone"),
        ({"weights": "random:many"}, "model.weights"),
        ({"weights": "file:/nowhere.safetensors"}, "model.weights"),
        ({"cut": 13}, "method.model.cut"),
        ({"prompt_at": "cut", "cut": 12}, "method.model.prompt_at"),
        ({"prompt_depth": "deep", "cut": 0}, "method.model.prompt_depth"),
        ({"tune": "adapter", "cut": 0}, "method.model.tune"),
    ):
        wrong = {**settings, "model": {**settings["model"], **change}}
        answer = operator.call(
            "POST", "/v1/runs", key=f"wrong-{next(_keys)}", json=custom_settings(wrong)
        )
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["field"] == field
    answer = operator.call("POST", "/v1/runs", key="x", json={"rounds": 1})
    assert (code_of(answer), answer.json()["error"]["field"]) == ("invalid_field", "rounds")
    answer = operator.call("POST", "/v1/runs", key="x", content=b"{")
    assert code_of(answer) == "invalid_field"
    answer = operator.call("POST", "/v1/runs", json=custom_settings(settings))
    assert answer.json()["error"]["field"] == "idempotency-key"


def test_a_repeated_creation_gives_the_same_run(operator: ApiClient) -> None:
    first = operator.create(run_settings(), key="same")
    assert operator.create(run_settings(), key="same") == first
    other = operator.call(
        "POST",
        "/v1/runs",
        key="same",
        json=custom_settings(run_settings(seed=1).model_dump(mode="json")),
    )
    assert code_of(other) == "idempotency_key_reused"
    listed = [RunView.model_validate(one) for one in operator.call("GET", "/v1/runs").json()]
    assert [one.id for one in listed].count(first.id) == 1


def test_a_repeated_join_gives_the_same_credential(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator)
    api = server.api()
    assert api.join(run, key="k").credential == api.join(run, key="k").credential
    assert api.join(run, "b", key="k2").credential != api.join(run, key="k").credential


def test_each_role_may_send_its_requests_only(server: RunningServer, operator: ApiClient) -> None:
    run, other = new_run(operator), new_run(operator)
    anonymous, participant, foreign = server.api(), joined(server, run), joined(server, other)
    forged = server.api("sfp1." + run + ".p0001." + "0" * 64)
    paths = [
        ("GET", f"/v1/runs/{run}/assignment"),
        ("PUT", f"/v1/runs/{run}/update"),
        ("DELETE", f"/v1/runs/{run}/participants/me"),
        ("DELETE", f"/v1/runs/{run}/samples"),
        ("GET", f"/v1/runs/{run}/head"),
        ("GET", f"/v1/runs/{run}/results"),
        ("GET", f"/v1/runs/{run}/events"),
    ]
    for method, path in paths:
        assert code_of(anonymous.call(method, path, key="k")) == "unauthorized"
        assert code_of(forged.call(method, path, key="k")) == "unauthorized"
        assert code_of(foreign.call(method, path, key="k")) == "forbidden"
    report = {"round": 1, "attempt": 0, "samples": 1, "correct": 1, "loss_sum": 1.0}
    for name, body in (("evaluation", report), ("participants/me/absence", {"reason": "it ends"})):
        path = f"/v1/runs/{run}/{name}"
        assert code_of(anonymous.call("PUT", path, key="k", json=body)) == "unauthorized"
        assert code_of(foreign.call("PUT", path, key="k", json=body)) == "forbidden"
    for kind in ("forward", "backward", "exchange", "infer", "samples", "missing"):
        assert code_of(anonymous.step(kind, smashed(), "s")) == "unauthorized"
        assert code_of(forged.step(kind, smashed(), "s")) == "unauthorized"
        assert code_of(operator.step(kind, smashed(), "s")) == "forbidden"
    settings = custom_settings(run_settings().model_dump(mode="json"))
    assert code_of(anonymous.call("POST", "/v1/runs", key="k", json=settings)) == "unauthorized"
    assert code_of(participant.call("POST", "/v1/runs", key="k", json=settings)) == "forbidden"
    assert code_of(participant.call("POST", f"/v1/runs/{run}/cancel", key="k")) == "forbidden"


def test_a_participant_that_left_is_refused(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator)
    api = joined(server, run)
    path = f"/v1/runs/{run}/participants/me"
    assert code_of(api.call("DELETE", path)) == "invalid_field"
    assert api.call("DELETE", path, key="k").json() == {}
    assert code_of(api.step("infer", smashed(), "s")) == "forbidden"
    assert code_of(api.update(run, state_of(1.0), "u")) == "forbidden"
    assert code_of(api.call("GET", f"/v1/runs/{run}/head")) == "forbidden"
    assert api.call("GET", f"/v1/runs/{run}/results").is_success
    assert api.call("GET", f"/v1/runs/{run}/events").is_success


def test_a_repeated_leave_gets_the_same_response(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, min_participants=2)
    api = joined(server, run)
    path = f"/v1/runs/{run}/participants/me"
    first, repeat = (api.call("DELETE", path, key="k") for _ in range(2))
    assert (first.status_code, first.content) == (repeat.status_code, repeat.content)
    assert code_of(api.call("DELETE", path, key="another")) == "forbidden"
    events = operator.call("GET", f"/v1/runs/{run}/events").json()
    assert [event["kind"] for event in events].count("participant_left") == 1


def test_the_task_of_a_participant_that_left_is_to_stop(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, min_participants=2)
    api = joined(server, run)
    assert api.assignment(run).task is Task.WAIT
    assert api.call("DELETE", f"/v1/runs/{run}/participants/me", key="k").is_success
    stop = api.assignment(run, "?task=wait&round=0&attempt=0&wait=30")
    assert (stop.task, stop.status) == (Task.STOP, RunStatus.WAITING)
    assert stop.reason is not None
    joined(server, run, "b")
    assert joined(server, run, "c").assignment(run).task is Task.TRAIN
    sampled = operator.call("GET", f"/v1/runs/{run}/results").json()["rounds"][0]["sampled"]
    assert sampled == ["p0002", "p0003"]


def test_refused_updates_do_not_count(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator, min_participants=2, evaluate_every=0, rounds=1)
    api, other = joined(server, run, "a"), joined(server, run, "b")
    good = state_of(1.0)
    nan = {**good, "prompts": good["prompts"] * float("nan")}
    bent = {**good, "prompts": good["prompts"][:1]}
    for state, meta, code in (
        (good, {"samples": 0}, "empty_update"),
        (nan, {}, "non_finite"),
        (bent, {}, "wrong_shape"),
        (good, {"round": 2}, "stale_round"),
        (good, {"attempt": 1}, "stale_round"),
        (good, {"samples": -1}, "invalid_field"),
        (good, {"samples": 1.5}, "invalid_field"),
        (good, {"samples": 10**6}, "invalid_field"),
    ):
        assert code_of(api.update(run, state, f"u-{code}-{next(_keys)}", **meta)) == code
    path = f"/v1/runs/{run}/update"
    assert code_of(api.call("PUT", path, key="k", content=b"x" * 100)) == "damaged_frame"
    wrong_kind = step_frame("forward", smashed(), "s")
    assert code_of(api.call("PUT", path, key="k", content=wrong_kind)) == "invalid_field"
    other.update(run, state_of(4.0), "u")
    results = Results.model_validate(operator.call("GET", f"/v1/runs/{run}/results").json())
    assert len(results.rounds[0].updated) == 1


def test_a_long_poll_is_answered_when_something_changes(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, min_participants=2)
    a = joined(server, run, "a")
    assert a.assignment(run, "?task=train&round=1&attempt=0&wait=30").task is Task.WAIT
    began = time.monotonic()
    same = a.assignment(run, "?task=wait&round=0&attempt=0&wait=0.3")
    assert same.task is Task.WAIT
    assert 0.3 <= time.monotonic() - began < 5
    timer = threading.Timer(0.3, lambda: joined(server, run, "b"))
    timer.start()
    began = time.monotonic()
    woken = a.assignment(run, "?task=wait&round=0&attempt=0&wait=30")
    assert woken.task is Task.TRAIN
    assert time.monotonic() - began < 5
    timer.join()
    events = operator.call("GET", f"/v1/runs/{run}/events").json()
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    last = events[-1]["seq"]
    empty = operator.call("GET", f"/v1/runs/{run}/events?after={last}&wait=0.1")
    assert empty.json() == []
    timer = threading.Timer(
        0.2, lambda: server.operator().call("POST", f"/v1/runs/{run}/cancel", key="k")
    )
    timer.start()
    news = operator.call("GET", f"/v1/runs/{run}/events?after={last}&wait=30").json()
    assert "run_cancelled" in [event["kind"] for event in news]
    timer.join()
    assert code_of(a.call("GET", f"/v1/runs/{run}/assignment?wait=-1")) == "invalid_field"


def test_the_deadline_passes_without_requests(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator, round_timeout_s=0.2, max_repeats=0)
    joined(server, run)
    path = f"/v1/runs/{run}/events?after=0&wait=20"
    events = operator.call("GET", path).json()
    while not (repeats := [event for event in events if event["kind"] == "round_repeated"]):
        events += operator.call("GET", path.replace("=0", f"={events[-1]['seq']}")).json()
    assert repeats[0]["data"] == {"round": 1, "attempt": 0, "updates": 0, "failure": False}


def test_a_device_hears_at_once_for_whom_a_run_waits_and_when_that_changes(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, min_participants=3)
    kitchen = joined(server, run, "kitchen")
    assert kitchen.assignment(run).waiting == "1 of 3 devices: kitchen; 2 more needed"
    timer = threading.Timer(0.2, lambda: joined(server, run, "hall"))
    timer.start()
    later = kitchen.assignment(run, "?task=wait&round=0&attempt=0&wait=20")
    assert later.waiting == "2 of 3 devices: hall, kitchen; 1 more needed"
    timer.join()


def test_a_device_that_ends_is_not_waited_for(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator, min_participants=2, rounds=1, evaluate_every=0)
    a, b = (joined(server, run, name) for name in "ab")
    assert a.update(run, state_of(1.0), "u").is_success
    path = f"/v1/runs/{run}/participants/me/absence"
    assert b.call("PUT", path, json={"reason": "it was stopped"}).json() == {}
    assert a.assignment(run).task is Task.STOP


def test_a_full_disk_pauses_a_run_and_no_device(
    server: RunningServer, operator: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object) -> None:
        raise OSError("no space left")

    run = new_run(operator, rounds=1, evaluate_every=0)
    api = joined(server, run)
    monkeypatch.setattr(advance, "_RETRY_S", 0.1)
    with monkeypatch.context() as broken:
        broken.setattr(transitions, "publish", full)
        assert api.update(run, state_of(1.0), "u").is_success
        for _ in range(3):
            assert api.assignment(run).task is Task.WAIT
            time.sleep(0.15)
    wait_until(lambda: api.assignment(run).task is Task.STOP)


def test_joining_requires_the_join_token_if_one_is_set(tmp_path: Path) -> None:
    with running_server(tmp_path, join_token="join-token-1") as running:
        run = running.operator().create(run_settings()).id
        path = f"/v1/runs/{run}/participants"
        request = {"name": "a", "train_samples": 1, "test_samples": 1, "num_classes": 10}
        assert code_of(running.api().call("POST", path, key="k", json=request)) == "unauthorized"
        assert (
            code_of(running.api("wrong-token").call("POST", path, key="k", json=request))
            == "unauthorized"
        )
        assert running.api("join-token-1").join(run).participant == "p0001"
        assert running.operator().http.headers["authorization"] == f"Bearer {OPERATOR}"


def test_a_stopping_server_ends_long_polls(tmp_path: Path) -> None:
    with running_server(tmp_path) as running:
        run = running.operator().create(run_settings(min_participants=2)).id
        api = joined(running, run)
        answers = []
        poll = threading.Thread(
            target=lambda: answers.append(
                api.assignment(run, "?task=wait&round=0&attempt=0&wait=60")
            )
        )
        poll.start()
        time.sleep(0.3)
        began = time.monotonic()
        running.server.should_exit = True
        poll.join(20)
        assert answers[0].task is Task.WAIT
        running.thread.join(20)
        assert time.monotonic() - began < 8
