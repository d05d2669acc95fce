"""Results that are delivered after their computation, as on a GPU."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from typing import cast

import pytest
import torch
from torch import Tensor

from split_model.backbone.weights import open_backbone
from split_model.parts.build import build_body
from split_server.engine.api import BackwardJob, ForwardJob, StepKey
from split_server.engine.delivery import CompletionQueue, Deliver, Fail, _Completion
from split_server.models.body_key import BodyKey
from tests.support.engine import MakeEngine, is_empty
from tests.support.federation import smashed


class DelayedCompletions(CompletionQueue):
    """Delivers each result when the test calls `deliver`."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._written: list[tuple[Tensor, Deliver]] = []

    def send(self, result: Tensor, deliver: Deliver, fail: Fail) -> None:
        self._written.append((result.detach().clone(), deliver))

    async def deliver(self, number: int) -> None:
        """Wait for the result of this number, then deliver it."""
        async with asyncio.timeout(20):
            while len(self._written) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        result, deliver = self._written[number]
        deliver(result)


def gradient_by_itself(key: BodyKey, tensor: Tensor, gradient: Tensor) -> Tensor:
    """Compute the input's gradient with the body itself."""
    body = build_body(key.settings, open_backbone(key.backbone))
    leaf = tensor.clone().requires_grad_()
    body(leaf).backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


def test_a_forward_may_be_delivered_after_the_backward_of_another_step_in_its_batch(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, queued = make(), DelayedCompletions()
    monkeypatch.setattr(engine._completions, "send", queued.send)
    inputs = [smashed(seed=seed) for seed in (1, 2)]
    gradients = [smashed(seed=seed) for seed in (3, 4)]
    names = [StepKey("r1", who, "s") for who in ("early", "late")]

    async def steps() -> list[Tensor]:
        with engine._lock:  # the worker takes both at once
            forwards = [
                asyncio.ensure_future(engine.submit(ForwardJob(name, key, tensor, 1)))
                for name, tensor in zip(names, inputs, strict=True)
            ]
            await asyncio.sleep(0)
            assert len(engine._schedule) == 2
        gradients_of_inputs = []
        for place, forward in enumerate(forwards):
            await queued.deliver(place)
            await forward
            job = BackwardJob(names[place], key, gradients[place], 2)
            backward = asyncio.ensure_future(engine.submit(job))
            await queued.deliver(2 + place)
            gradients_of_inputs.append(await backward)
        return gradients_of_inputs

    for place, result in enumerate(asyncio.run(steps())):
        expected = gradient_by_itself(key, inputs[place], gradients[place])
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert is_empty(engine)


class Computed:
    """The event of a finished computation."""

    def synchronize(self) -> None:
        """Return at once."""


class JobData:
    """An object that a job refers to."""


@pytest.mark.parametrize("fails", [False, True])
def test_a_delivered_result_is_freed(fails: bool) -> None:
    completions = CompletionQueue(torch.device("cuda"))  # starts its thread, without a GPU
    delivered, data = threading.Event(), JobData()
    data_ref = weakref.ref(data)

    def deliver(_: Tensor, data: JobData = data) -> None:
        if fails:
            raise ZeroDivisionError
        delivered.set()

    event = cast(torch.cuda.Event, Computed())
    completion = _Completion(event, torch.empty(1), deliver, lambda _: delivered.set())
    completions._queued.put(completion)
    del completion, deliver, data
    assert delivered.wait(20)
    give_up_at = time.monotonic() + 20
    while data_ref() is not None and time.monotonic() < give_up_at:
        time.sleep(0.005)
    assert data_ref() is None
    completions.close()
