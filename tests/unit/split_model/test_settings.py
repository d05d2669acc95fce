"""Settings: every limit bites, with the field, the limit and the value in the error."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_model import SplitSettings, SplitSettingsError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", ""),
        ("backbone", 3),
        ("image_size", 0),
        ("image_size", 4097),
        ("image_size", True),
        ("image_size", 56.0),
        ("cut", -1),
        ("tail_blocks", -1),
        ("num_classes", 0),
        ("prompt_count", -1),
        ("prompt_count", 4097),
        ("prompt_at", "output"),
        ("prompt_depth", "middle"),
        ("tune", "head"),
        ("adapter_width", 0),
        ("model_overrides", "depth"),
        ("model_overrides", (("depth",),)),
        ("model_overrides", ((1, 2),)),
        ("model_overrides", (("num_classes", 3),)),
        ("model_overrides", (("pretrained", True),)),
        ("model_overrides", (("depth", object()),)),
    ],
)
def test_a_value_outside_its_limit_is_refused(field: str, value: Any) -> None:
    with pytest.raises(SplitSettingsError) as caught:
        SplitSettings(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value)
    assert caught.value.limit in str(caught.value)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("prompt_depth", {"prompt_depth": "deep", "cut": 0}),  # no block ahead of which to stand
        ("tune", {"tune": "adapter", "cut": 0}),
        ("tune", {"tune": "adapter", "prompt_at": "cut"}),  # that head never changes
        ("tune", {"tune": "bias", "prompt_at": "cut"}),
        ("tune", {"tune": "full", "prompt_at": "cut"}),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    field: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(SplitSettingsError) as caught:
        SplitSettings(**settings)
    assert caught.value.field == field


@given(
    st.builds(
        SplitSettings,
        backbone=st.text(min_size=1),
        image_size=st.integers(1, 4096),
        cut=st.integers(0, 1024),
        tail_blocks=st.integers(0, 1024),
        num_classes=st.integers(1, 1_000_000),
        prompt_at=st.just("cut"),
        prompt_depth=st.sampled_from(["shallow", "deep"]),
        prompt_count=st.integers(0, 4096),
        model_overrides=st.lists(
            st.tuples(st.just("x"), st.integers() | st.lists(st.integers()) | st.none())
        ).map(tuple),
    )
)
def test_settings_survive_json(settings: SplitSettings) -> None:
    again = SplitSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert hash(again) == hash(settings)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(SplitSettingsError, match="'colour'"):
        SplitSettings.from_dict({"colour": "red"})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SplitSettings().cut = 3  # type: ignore[misc]
