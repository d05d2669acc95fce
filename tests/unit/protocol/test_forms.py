"""The forms of the method, and the values that override them."""

from __future__ import annotations

import pytest

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import RunPlan
from protocol.presets import FORMS, over_form


def build_plan(form: str, **values: object) -> RunPlan:
    (known,) = [name for name in FORMS if name == form]
    return parse_message(RunPlan, over_form(known, {"name": "run", **values}))


def test_the_default_form_sends_smashed_data_once() -> None:
    run = build_plan("default", model={"num_classes": 6})
    assert (run.model.prompt_at, run.model.prompt_depth, run.model.num_classes) == (
        "cut",
        "deep",
        6,
    )
    assert run.wire.keep_smashed
    assert run.training.local_epochs == 0


def test_the_paper_form_follows_the_paper() -> None:
    run = build_plan("paper")
    assert (run.model.prompt_at, run.training.pruning) == ("input", "el2n")
    assert {run.wire.smashed, run.wire.features, run.wire.gradients} == {"float32"}
    assert not run.wire.keep_smashed
    assert run.training.local_epochs == 1


@pytest.mark.parametrize("form", FORMS)
def test_given_values_override_the_form_and_do_not_change(form: str) -> None:
    given = {"training": {"keep_fraction": 0.25}, "wire": {"features": "bfloat16"}}
    run = build_plan(form, **given)
    assert (run.training.keep_fraction, run.wire.features) == (0.25, "bfloat16")
    assert given == {"training": {"keep_fraction": 0.25}, "wire": {"features": "bfloat16"}}


def test_a_part_other_than_a_table_is_refused() -> None:
    with pytest.raises(InvalidField) as caught:
        build_plan("default", training=3)
    assert "training" in str(caught.value)
