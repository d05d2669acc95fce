"""The calculated bytes of a head file against the file."""

from pathlib import Path

import pytest

from protocol.plan import ModelPlan
from sfprompt_bench.cost.sizes import head_bytes
from split_model.backbone.weights import prepare_backbone
from split_model.checkpoints.head_file import HeadDtype, write_head_file

PLAN = ModelPlan(
    backbone="vit_tiny_patch16_224", weights="random:0", image_size=96, prompt_at="cut"
)

MAX_HEADER_BYTES = 8192


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_head_file_has_the_calculated_bytes_and_a_header(
    dtype: HeadDtype, tmp_path: Path
) -> None:
    backbone = prepare_backbone(PLAN, PLAN.weights, tmp_path)
    path, _ = write_head_file(PLAN, backbone.path, tmp_path / "head", dtype)
    header = path.stat().st_size - head_bytes(PLAN, dtype)
    assert 0 < header < MAX_HEADER_BYTES
