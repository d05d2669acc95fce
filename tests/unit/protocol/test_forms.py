"""The forms of SFPrompt, and what a run's own settings change of them."""

from __future__ import annotations

import pytest

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import RunPlan
from protocol.presets import FORMS, Form, over_form
from protocol.settings import RunSettings


def plan_of(form: Form, **values: object) -> RunPlan:
    return parse_message(RunSettings, over_form(form, {"name": "run", **values})).plan


def test_the_default_form_sends_a_samples_smashed_data_once() -> None:
    plan = plan_of("default", model={"num_classes": 6}, method={"split_epochs": 1})
    assert (plan.model.prompt_at, plan.model.prompt_depth) == ("cut", "deep")
    assert plan.model.num_classes == 6
    assert plan.wire.keep_smashed
    assert plan.training.local_epochs == 0


def test_the_papers_form_is_the_published_one() -> None:
    plan = plan_of("paper")
    assert (plan.model.prompt_at, plan.training.pruning) == ("input", "el2n")
    assert {plan.wire.smashed, plan.wire.features, plan.wire.gradients} == {"float32"}
    assert not plan.wire.keep_smashed
    assert plan.training.local_epochs == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_runs_own_settings_win_over_the_form_and_are_not_changed(form: Form) -> None:
    given = {"method": {"keep_fraction": 0.25}, "wire": {"features": "bfloat16"}}
    plan = plan_of(form, **given)
    assert (plan.training.keep_fraction, plan.wire.features) == (0.25, "bfloat16")
    assert given == {"method": {"keep_fraction": 0.25}, "wire": {"features": "bfloat16"}}


@pytest.mark.parametrize("part", ["training", "method"])
def test_a_part_that_is_no_table_is_refused_by_name(part: str) -> None:
    with pytest.raises(InvalidField) as caught:
        plan_of("default", **{part: 3})
    assert part in str(caught.value)
