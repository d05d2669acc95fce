"""The model's plan: each limit bites, with the field's name, and a plan survives a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import ModelPlan, RunPlan
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.checkpoints.metadata import model_metadata, read_plan
from split_model.errors import TensorFileError
from tests.support.uncut_model import reduced, refused_field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", ""),
        ("backbone", 3),
        ("image_size", 7),
        ("image_size", 2049),
        ("image_size", True),
        ("image_size", 56.5),
        ("cut", -1),
        ("cut", 257),
        ("tail_blocks", -1),
        ("num_classes", 1),
        ("prompt_count", -1),
        ("prompt_count", 1025),
        ("prompt_at", "output"),
        ("prompt_depth", "middle"),
        ("tune", "head"),
        ("adapter_width", 0),
        ("blocks", [-1]),
        ("blocks", [256]),
        ("blocks", [0.5]),
        ("blocks", list(range(257))),
        ("mlp_widths", [-1]),
        ("mlp_widths", [65_537]),
        ("mlp_widths", [0] * 257),
        ("model_overrides", "depth"),
        ("model_overrides", (("depth",),)),
        ("model_overrides", ((1, 2),)),
        ("model_overrides", (("num_classes", 3),)),
        ("model_overrides", (("pretrained", True),)),
        ("model_overrides", (("depth", object()),)),
    ],
)
def test_a_value_outside_its_limit_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_message(ModelPlan, {field: value})
    assert str(caught.value.field).split(".")[0] == field


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt_depth", {"prompt_depth": "deep", "cut": 0}),  # no block to stand before
        ("tune", {"tune": "adapter", "cut": 0}),
        ("tune", {"tune": "adapter", "prompt_at": "cut"}),  # that head never changes
        ("tune", {"tune": "bias", "prompt_at": "cut"}),
        ("tune", {"tune": "full", "prompt_at": "cut"}),
        ("keep_tokens", {"keep_tokens": 4}),
        ("tune_body", {"tune_body": True, "prompt_count": 0}),
        ("tune_body", {"tune_body": True, "tune": "full"}),
        ("blocks", {"blocks": (2, 0)}),
        ("blocks", {"blocks": (1, 1)}),
        ("mlp_widths", {"blocks": (0, 2), "mlp_widths": (8,)}),
    ],
)
def test_fields_that_contradict_each_other_are_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_message(RunPlan, {"model": changes})
    error = caught.value
    assert error.field == f"model.{field}"
    assert error.value == (None if isinstance(changes[field], tuple) else changes[field])
    assert str(error.limit) in error.message
    assert refused_field(lambda: ModelPlan().replace(**changes)) == field


@given(
    st.builds(
        ModelPlan,
        backbone=st.text(min_size=1, max_size=200),
        image_size=st.integers(8, 2048),
        cut=st.integers(0, 256),
        tail_blocks=st.integers(0, 256),
        num_classes=st.integers(2, 100_000),
        prompt_at=st.just("cut"),
        prompt_depth=st.sampled_from(["shallow", "deep"]),
        prompt_count=st.integers(0, 1024),
        blocks=st.sets(st.integers(0, 255)).map(lambda numbers: tuple(sorted(numbers))),
        model_overrides=st.lists(
            st.tuples(st.just("x"), st.integers() | st.lists(st.integers()) | st.none())
        ).map(tuple),
    )
)
def test_equal_plans_are_equal_keys(plan: ModelPlan) -> None:
    again = ModelPlan.model_validate(dict(plan))
    assert again == plan
    assert hash(again) == hash(plan)


def test_a_plan_survives_a_file_without_the_source_of_its_weights(tmp_path: Path) -> None:
    plan = reduced("vit_base_patch16_224").replace(
        cut=1, tune="lora", blocks=(1,), mlp_widths=(8,), weights="file:/home/a/b"
    )
    write_tensors(tmp_path / "file", {"x": torch.zeros(1)}, model_metadata(plan))
    file = TensorFile(tmp_path / "file")
    assert read_plan(file) == plan.replace(weights="packaged")
    assert "/home/a/b" not in str(file.metadata)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"colour": "red"}, "colour"),
        ({"cut": -1}, "cut"),
        ({"cut": 1.0}, "cut"),
        ({"tune_body": 1}, "tune_body"),
        ({"model_overrides": [["checkpoint_path", "/etc/passwd"]]}, "model_overrides"),
        ({"tune": "full", "prompt_at": "cut"}, "tune"),
    ],
)
def test_a_plan_in_a_file_is_not_trusted(
    changes: dict[str, Any], place: str, tmp_path: Path
) -> None:
    metadata = {"settings": json.dumps({"cut": 2, **changes})}
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata=metadata)
    with pytest.raises(TensorFileError, match=f"settings are invalid: {place}"):
        read_plan(TensorFile(tmp_path / "file"))


def test_a_file_as_earlier_releases_wrote_it_is_readable(tmp_path: Path) -> None:
    overrides = [["depth", 4]]
    values = {"backbone": "vit_tiny_patch16_224", "cut": 3, "model_overrides": overrides}
    values |= {"local_body": 2, "proxy": "none", "proxy_ends": 1}
    values |= {"proxy_width": 0, "proxy_blocks": 0}
    metadata = {"settings": json.dumps(values)}
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata=metadata)
    plan = read_plan(TensorFile(tmp_path / "file"))
    assert plan == ModelPlan(
        backbone="vit_tiny_patch16_224", cut=3, model_overrides=(("depth", 4),)
    )


def test_nested_metadata_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata={"settings": nested})
    with pytest.raises(TensorFileError):
        read_plan(TensorFile(tmp_path / "file"))


def test_overrides_never_leave_with_a_run() -> None:
    plan = RunPlan(model=reduced("vit_base_patch16_224"))
    assert "model_overrides" not in plan.model_dump_json()


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelPlan().cut = 3  # type: ignore[misc]
