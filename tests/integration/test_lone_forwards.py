"""Runs whose devices need no gradient from the server: each step is a forward request only."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch

from protocol.plan import RunPlan
from tests.support.federation import SMALL, TOKENS, WIDTH, run_settings
from tests.support.server import RunningServer, code_of, joined, tensor_in


@pytest.mark.parametrize(
    ("changes", "has_backward"),
    [
        ({"prompt_count": 0, "tune": "tail"}, False),
        ({"prompt_count": 0, "tune": "classifier"}, False),
        ({"prompt_count": 0, "tune": "bias"}, True),
        ({"prompt_count": 2, "tune": "classifier"}, True),
    ],
)
def test_a_step_is_retained_only_if_a_parameter_before_the_body_is_tuned(
    server: RunningServer, changes: dict[str, Any], has_backward: bool
) -> None:
    settings: RunPlan = run_settings()
    settings = settings.model_copy(update={"model": SMALL.model_copy(update=changes)})
    run = server.operator().create(settings, key=uuid.uuid4().hex).id
    api = joined(server, run)
    api.assignment(run)
    shape = (2, TOKENS - 2 + changes["prompt_count"], WIDTH)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    first = api.step("forward", rows, "s")
    assert tensor_in(first, "features").shape == shape
    assert api.step("forward", rows, "s").content == first.content
    assert code_of(api.step("forward", rows + 1, "s")) == "idempotency_key_reused"
    metrics = server.operator().call("GET", "/metrics").text
    assert (_gauge(metrics, "sfprompt_engine_open_steps") > 0) == has_backward
    assert (_gauge(metrics, "sfprompt_engine_retained_bytes") > 0) == has_backward
    response = api.step("backward", rows, "s")
    if has_backward:
        assert tensor_in(response, "gradients").shape == shape
    else:
        assert code_of(response) == "step_lost"


def _gauge(metrics: str, name: str) -> float:
    [line] = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])
