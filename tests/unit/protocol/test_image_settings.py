"""Settings of images and classes, which devices, evaluation and exported files share."""

from __future__ import annotations

import json
import unicodedata

import pytest
from pydantic import ValidationError

from protocol.plan import ModelPlan, RunPlan
from protocol.settings import RunSettings

CAFE = "caf\u00e9"


def test_how_images_are_fitted_is_part_of_the_plan() -> None:
    settings = RunSettings.model_validate({"model": {"fit": "pad", "background": "#102030"}})
    model = settings.plan.model
    assert (model.fit, model.background) == ("pad", "#102030")
    assert RunPlan.model_validate_json(settings.plan.model_dump_json()).model == model


def test_images_are_cropped_on_white_by_default_as_in_files_of_before() -> None:
    values = json.loads(ModelPlan().model_dump_json())
    earlier = {name: values[name] for name in values if name not in ("fit", "background")}
    model = ModelPlan.model_validate(earlier)
    assert (model.fit, model.background) == ("crop", "#ffffff")


@pytest.mark.parametrize(
    ("field", "value"),
    [("fit", "zoom"), ("background", "white"), ("background", "#FFFFFF"), ("background", "#fff")],
)
def test_other_values_are_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RunSettings.model_validate({"model": {field: value}})
    assert refused.value.errors()[0]["loc"][-1] == field


def test_class_names_are_kept_in_one_unicode_form() -> None:
    names = [unicodedata.normalize("NFD", CAFE), "bar"]
    settings = RunSettings.model_validate({"class_names": names, "model": {"num_classes": 2}})
    assert settings.class_names == settings.plan.class_names == (CAFE, "bar")
