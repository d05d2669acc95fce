"""Any difference from the undisturbed run is found: a state, a lost update, one counted twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protocol.plan import RunPlan
from sfprompt_bench.chaos.outcome import Outcome, read_outcome
from sfprompt_bench.poison.federation import local_federation
from split_model.checkpoints.state import device_shapes
from split_server.storage.database import EventRow, Store, UpdateRow

DEVICES = 3

PLAN = RunPlan.model_validate(
    {
        "model": {"backbone": "test_vit", "image_size": 32, "prompt_count": 2},
        "federation": {"rounds": 2, "min_updates": DEVICES, "evaluate_every": 0},
    }
)


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A finished run of three devices, by its id; its database is in the folder."""
    update = {name: torch.ones(shape) for name, shape in device_shapes(PLAN.model).items()}
    with local_federation(tmp_path, PLAN, [5] * DEVICES) as federation:
        for _ in range(2):
            federation.send(dict.fromkeys(range(DEVICES), update), [5] * DEVICES)
        assert not federation.is_open()
        return federation.run


def test_an_outcome_has_each_update_of_each_round(tmp_path: Path, run: str) -> None:
    outcome = read_outcome(tmp_path, run)
    assert outcome.status == "finished"
    assert [(row.round, row.states, row.samples) for row in outcome.rounds] == [
        (1, 1, 15),
        (2, 1, 15),
    ]
    everybody = (("device-0", 5), ("device-1", 5), ("device-2", 5))
    for row in outcome.rounds:
        assert row.counted == row.received == everybody
    assert outcome.differences(outcome) == []


def test_a_lost_update_and_one_that_is_counted_twice_are_differences(
    tmp_path: Path, run: str
) -> None:
    reference = read_outcome(tmp_path, run)
    store = Store(tmp_path / "server.sqlite")
    with store.writing() as session:
        session.delete(session.get_one(UpdateRow, (run, 1, 0, "p0002")))
        counted = [
            event
            for event in session.query(EventRow).filter_by(run_id=run, kind="update_counted")
            if event.data["round"] == 2
        ]
        again = EventRow(
            run_id=run, seq=10_000, at=0.0, kind="update_counted", data=counted[0].data
        )
        session.add(again)
    store.close()
    found = read_outcome(tmp_path, run).differences(reference)
    assert [text.split(":")[0] for text in found] == ["round 1, received", "round 2, counted"]


@pytest.mark.parametrize(
    ("field", "value"), [("status", "failed"), ("tail", "0" * 64), ("prompts", "1" * 64)]
)
def test_another_end_is_a_difference(tmp_path: Path, run: str, field: str, value: str) -> None:
    reference = read_outcome(tmp_path, run)
    other: Outcome = replace(reference, **{field: value})
    [text] = other.differences(reference)
    assert text.startswith(f"{field}: {value}")
