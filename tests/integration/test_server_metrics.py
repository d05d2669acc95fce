"""The engine's work in the Prometheus metrics and in a run's events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.federation import smashed, state_of
from tests.support.server import (
    RunningServer,
    joined,
    labels,
    measured,
    new_run,
    running_server,
    wait_until,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


def test_a_step_is_counted_for_its_run_until_the_run_is_over(server: RunningServer) -> None:
    operator = server.operator()
    run = new_run(operator, rounds=1, min_participants=1, evaluate_every=0)
    device = joined(server, run, "a")
    device.assignment(run)
    device.step("forward", smashed(batch=3), "s")
    waiting = measured(server)
    assert waiting["sfprompt_engine_open_steps", labels()] == 1
    assert waiting["sfprompt_engine_retained_bytes", labels()] > 0
    device.step("backward", smashed(batch=3), "s")
    samples = "sfprompt_engine_samples_total"
    wait_until(lambda: (samples, labels(run=run, work="backward")) in measured(server))
    found = measured(server)
    for work in ("forward", "backward"):
        assert found[samples, labels(run=run, work=work)] == 3
        assert found["sfprompt_engine_batch_samples_count", labels(work=work)] >= 1
        assert found["sfprompt_engine_compute_seconds_sum", labels(work=work)] > 0
    assert found["sfprompt_engine_run_tasks_total", labels(run=run)] == 2
    assert found["sfprompt_engine_run_batch_samples_total", labels(run=run)] == 6
    assert found["sfprompt_engine_run_compute_seconds_total", labels(run=run)] > 0
    sent = found["sfprompt_wire_bytes_total", labels(run=run, phase="smashed", direction="up")]
    assert sent > smashed(batch=3).nbytes
    for gauge in ("open_steps", "retained_bytes", "queue_tasks", "queue_samples", "queue_bytes"):
        assert found[f"sfprompt_engine_{gauge}", labels()] == 0

    assert device.step("backward", smashed(), "lost").status_code >= 400
    device.update(run, state_of(1.0), "u", samples=3)
    wait_until(lambda: (samples, labels(run=run, work="forward")) not in measured(server))
    events = operator.call("GET", f"/v1/runs/{run}/events").json()
    work = next(event["data"] for event in events if event["kind"] == "engine")
    assert (work["tasks"], work["samples"], work["batch_samples"]) == (2, 6, 3)
    assert work["compute_s"] >= 0
