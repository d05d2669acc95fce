"""What a run is made of where its owner leaves it open."""

from __future__ import annotations

import pytest

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import RunPlan
from protocol.presets import FORMS, over_form


def made(form: str, **values: object) -> RunPlan:
    (known,) = [one for one in FORMS if one == form]
    return parse_message(RunPlan, over_form(known, {"name": "run", **values}))


def test_the_default_form_moves_a_samples_smashed_data_once() -> None:
    run = made("default", model={"num_classes": 6})
    assert (run.model.prompt_at, run.model.prompt_depth, run.model.num_classes) == (
        "cut",
        "deep",
        6,
    )
    assert run.wire.keep_smashed
    assert run.training.local_epochs == 0


def test_the_papers_form_is_the_published_one() -> None:
    run = made("paper")
    assert (run.model.prompt_at, run.training.pruning) == ("input", "el2n")
    assert {run.wire.smashed, run.wire.features, run.wire.gradients} == {"float32"}
    assert not run.wire.keep_smashed
    assert run.training.local_epochs == 1


@pytest.mark.parametrize("form", FORMS)
def test_what_is_given_wins_over_the_form_and_is_not_changed(form: str) -> None:
    given = {"training": {"keep_fraction": 0.25}, "wire": {"features": "bfloat16"}}
    run = made(form, **given)
    assert (run.training.keep_fraction, run.wire.features) == (0.25, "bfloat16")
    assert given == {"training": {"keep_fraction": 0.25}, "wire": {"features": "bfloat16"}}


def test_a_part_that_is_no_table_is_refused_by_name() -> None:
    with pytest.raises(InvalidField) as caught:
        made("default", training=3)
    assert "training" in str(caught.value)
