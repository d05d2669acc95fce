"""Parsing requests of the split plane: permission first, then content, into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import InvalidField, MalformedFrame, RunClosed, SFPromptError, StaleRound
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.limits import DEFAULT_LIMITS
from split_server.models.body_key import BodyKey
from split_server.payloads import requests
from split_server.payloads.requests import (
    CachedBatch,
    SplitRequest,
    decode_batch,
    decode_batch_gradients,
)
from tests.support.federation import TOKENS, WIDTH, run_settings, smashed
from tuning_methods.sfprompt.server_deltas import parse_delta_forward
from tuning_methods.splitfed.server import parse_body_step_meta

STATE = "a" * 64

IDS = torch.arange(32, dtype=torch.uint8).reshape(2, 16)

AT_CUT = torch.zeros(2, TOKENS - 2, WIDTH)  # without prompts

SESSION = {"session": "s", "round": 1, "attempt": 0, "steps": 2}


@dataclass
class Permission:
    """Records the checks, and refuses every request if it is closed."""

    closed: bool = False
    checks: list[tuple[object, ...]] = field(default_factory=list)

    def require_running(self) -> None:
        self._check("running")

    def require_trainer(self, round_: int, attempt: int | None) -> None:
        self._check("trainer", round_, attempt)

    def require_pending_update(self, round_: int, attempt: int) -> None:
        self._check("pending update", round_, attempt)

    def _check(self, *check: object) -> None:
        self.checks.append(check)
        if self.closed:
            raise RunClosed("the run is over", field="run")


def request(
    meta: Mapping[str, Any],
    permission: Permission | None = None,
    prompt_at: str = "input",
    wire: Mapping[str, Any] | None = None,
    **tensors: Tensor,
) -> SplitRequest:
    encoded = {name: (t, str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    plan = run_settings(prompt_at=prompt_at, wire=wire)
    return SplitRequest(
        run="r1",
        participant="p1",
        plan=plan,
        body=BodyKey.of("backbone.safetensors", plan),
        state=STATE,
        permission=permission or Permission(),
        frame=decode_frame(join_frame(encode_frame("any", meta, encoded))),
        fingerprint=0,
        limits=DEFAULT_LIMITS,
        device=torch.device("cpu"),
    )


def test_a_forward_is_parsed_into_a_frozen_request() -> None:
    permission = Permission()
    forward = requests.parse_forward(
        request({"step": "s", "round": 1}, permission, smashed=smashed())
    )
    assert torch.equal(forward.smashed, smashed())
    assert (forward.meta.step, permission.checks) == ("s", [("trainer", 1, None)])
    with pytest.raises(FrozenInstanceError):
        forward.smashed = smashed(seed=1)  # type: ignore[misc]


def test_a_forward_with_deltas_is_parsed_without_the_cache() -> None:
    forward = parse_delta_forward(
        request(
            {"step": "s", "round": 1},
            ids=IDS,
            versions=torch.tensor([[1, 1], [2, 2]]),
        )
    )
    assert forward.batch.ids == [bytes(row.tolist()) for row in IDS]


@pytest.mark.parametrize("tensors", [{"ids": IDS}, {"ids": IDS, "smashed": AT_CUT}])
def test_a_forward_names_no_samples(tensors: Mapping[str, Tensor]) -> None:
    with pytest.raises(InvalidField) as caught:
        requests.parse_forward(request({"step": "s", "round": 1}, **tensors))
    assert caught.value.field == "ids"


def test_an_exchange_names_or_carries_its_batch() -> None:
    named = requests.parse_exchange(
        request({**SESSION, "number": 0}, None, "cut", {"keep_smashed": True}, ids=IDS)
    )
    assert isinstance(named.batch, CachedBatch)
    assert named.gradients is None
    gradients = torch.ones(2, TOKENS, WIDTH)
    last = requests.parse_exchange(
        request({**SESSION, "number": 2}, None, "cut", gradients=gradients)
    )
    assert last.batch is None
    assert last.gradients is not None
    assert torch.equal(last.gradients, gradients)


def test_round_0_has_no_exchange() -> None:
    meta = {**SESSION, "round": 0, "number": 0}
    with pytest.raises(InvalidField) as caught:
        requests.parse_exchange(request(meta, None, "cut", {"keep_smashed": True}, ids=IDS))
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("round", 1, 0)


@pytest.mark.parametrize(
    ("parse", "meta", "prompt_at", "check"),
    [
        (requests.parse_forward, {"step": "s", "round": 3}, "input", ("trainer", 3, None)),
        (parse_delta_forward, {"step": "s", "round": 3}, "input", ("trainer", 3, None)),
        (requests.parse_backward, {"step": "s", "round": 3}, "input", ("trainer", 3, None)),
        (requests.parse_exchange, {**SESSION, "number": 0}, "cut", ("trainer", 1, 0)),
        (parse_body_step_meta, {**SESSION, "number": 0}, "input", ("pending update", 1, 0)),
        (requests.parse_samples, {}, "cut", ("running",)),
    ],
)
def test_permission_is_checked_before_the_tensors(
    parse: Callable[[SplitRequest], object],
    meta: Mapping[str, Any],
    prompt_at: str,
    check: tuple[object, ...],
) -> None:
    """The frames lack every tensor, which a later check would refuse."""
    permission = Permission(closed=True)
    wire = {"keep_smashed": prompt_at == "cut"}
    closed = request(meta, permission, prompt_at, wire)
    with pytest.raises(RunClosed):
        parse(closed)
    assert permission.checks == [check]


def test_an_inference_must_name_the_newest_state() -> None:
    infer = {"step": "s", "round": 1}
    assert isinstance(requests.parse_infer(request(infer, smashed=smashed())).batch, Tensor)
    requests.parse_infer(request({**infer, "state": STATE}, smashed=smashed()))
    with pytest.raises(StaleRound):
        requests.parse_infer(request({**infer, "state": "b" * 64}, smashed=smashed()))


@pytest.mark.parametrize(
    ("wire", "tensors", "error", "field_"),
    [
        ({}, {"ids": IDS}, InvalidField, "keep_smashed"),
        ({"keep_smashed": True}, {"ids": IDS, "smashed": AT_CUT}, MalformedFrame, "tensors"),
        ({"keep_smashed": True}, {}, MalformedFrame, "tensors"),
    ],
)
def test_a_batch_is_either_sent_or_named(
    wire: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    error: type[SFPromptError],
    field_: str,
) -> None:
    with pytest.raises(error) as caught:
        requests.parse_infer(request({"step": "s", "round": 1}, None, "cut", wire, **tensors))
    assert caught.value.field == field_


@pytest.mark.parametrize(
    ("parse", "prompt_at", "meta", "tensors"),
    [
        (requests.parse_forward, "input", {"step": "s", "round": 1}, {"smashed": smashed()}),
        (requests.parse_backward, "input", {"step": "s", "round": 1}, {"gradients": smashed()}),
        (requests.parse_exchange, "cut", {**SESSION, "number": 0}, {"ids": IDS}),
        (requests.parse_exchange, "cut", {**SESSION, "number": 2}, {"gradients": smashed()}),
        (requests.parse_infer, "cut", {"step": "s", "round": 1}, {"ids": IDS}),
        (requests.parse_infer, "cut", {"step": "s", "round": 1}, {"smashed": AT_CUT}),
        (requests.parse_samples, "cut", {}, {"ids": IDS, "smashed": AT_CUT}),
        (requests.parse_missing, "cut", {}, {"ids": IDS}),
        (decode_batch, "input", {}, {"smashed": smashed()}),
        (decode_batch_gradients, "input", {}, {"gradients": smashed()}),
    ],
)
def test_a_request_carries_exactly_the_tensors_of_its_kind(
    parse: Callable[[SplitRequest], object],
    prompt_at: str,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """A client cannot send labels along, and the server would not take them."""
    wire = {"keep_smashed": prompt_at == "cut"}
    parse(request(meta, None, prompt_at, wire, **tensors))
    labels = torch.tensor([0, 1])
    for wrong in ({**tensors, "labels": labels}, {"labels": labels}, {}):
        with pytest.raises(MalformedFrame):
            parse(request(meta, None, prompt_at, wire, **wrong))
