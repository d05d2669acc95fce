"""A simulated day: devices that come and go on a real server, and the bounds of its resources."""

from __future__ import annotations

import asyncio
from pathlib import Path

from protocol.federation import FederationSettings
from protocol.plan import RunPlan, TrainingPlan
from sfprompt_bench.day.devices import Day, live_through
from sfprompt_bench.day.measurement import MODEL, DayResult, Sample
from tests.support.server import running_server

MIB = 1024 * 1024


def test_simulated_devices_come_train_and_go(tmp_path: Path) -> None:
    plan = RunPlan(
        model=MODEL,
        federation=FederationSettings(
            rounds=1000, min_participants=2, round_timeout_s=3.0, evaluate_every=0, max_repeats=999
        ),
        training=TrainingPlan(batch_size=8),
    )
    with running_server(tmp_path, max_wait_s=0.1, live_window_s=1.0) as server:
        run = server.operator().create(plan).id
        day = Day(server.port, run, MODEL.model_dump(mode="json"), 7200.0, 4 * 7200.0, 8, seed=0)
        asyncio.run(live_through(day))
        results = server.operator().call("GET", f"/v1/runs/{run}/results").json()
    expected = ("participants 201", "forward 200", "backward 200", "update 200", "me 200")
    assert all(day.counts[name] for name in expected), day.counts
    assert not any(name.startswith("failure") or " 5" in name for name in day.counts), day.counts
    closed = [each for each in results["rounds"] if each["status"] == "closed"]
    assert closed
    assert len(results["participants"]) > 8, "some come back under a new name"


def result_of(**growth: int) -> DayResult:
    """A day in which some figures grow by so much an hour."""
    start = {"memory": 400 * MIB, "descriptors": 50, "files": 20, "database": MIB}
    samples = [
        Sample(
            hour=float(hour),
            rounds=6 * hour,
            participants=50,
            connections=hour,
            **{name: value + hour * growth.get(name, 0) for name, value in start.items()},
        )
        for hour in range(25)
    ]
    return DayResult(24, 300, 200, samples, {})


def exceeded(result: DayResult) -> list[str]:
    return [name for name, (value, bound) in result.figures().items() if value > bound]


def test_a_flat_day_is_within_all_bounds() -> None:
    assert exceeded(result_of()) == []
    assert exceeded(result_of(files=6, database=6 * 20_000)) == []  # one state for each round


def test_growth_is_found() -> None:
    assert exceeded(result_of(memory=2 * MIB)) == ["growth of memory, %"]
    assert exceeded(result_of(descriptors=1)) == ["more descriptors"]
    assert exceeded(result_of(files=18)) == ["files a round"]
    assert exceeded(result_of(database=MIB)) == ["database, KiB a round"]
