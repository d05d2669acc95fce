"""Memory and download of a device, measured in a process for this purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from protocol.plan import ModelPlan
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.head_file import write_head_file
from split_model.checkpoints.state import initial_state, save_state
from split_model.parts.cost import part_bytes

ROOT = Path(__file__).parents[2]

SETTINGS = ModelPlan(
    backbone="vit_small_patch16_224", weights="random:0", image_size=224, cut=1, prompt_count=10
)


def test_a_device_needs_no_more_memory_than_head_tail_and_one_batch_of_activations(
    tmp_path: Path,
) -> None:
    split = SETTINGS
    backbone = prepare_backbone(split, SETTINGS.weights, tmp_path)
    head, _ = write_head_file(split, backbone.path, tmp_path / "head.safetensors")
    state = tmp_path / "state.safetensors"
    save_state(initial_state(split, open_backbone(backbone.path), 0), state)
    process = subprocess.run(
        [
            *(sys.executable, "-m", "sfprompt_bench.micro.device_step"),
            *(SETTINGS.model_dump_json(), str(head), str(state)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        # glibc keeps freed memory; the step's own peak is what counts.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    budget = measured["parts"] + measured["activations"]
    assert measured["extra_peak"] <= budget, measured
    assert measured["extra_peak"] < backbone.nbytes + measured["activations"]


def test_a_device_downloads_less_than_15_percent_of_the_backbone_at_cut_1() -> None:
    for backbone, size in (("vit_small_patch14_dinov2", 56), ("vit_base_patch16_224", 224)):
        sizes = part_bytes(ModelPlan(backbone=backbone, image_size=size, cut=1))
        assert sizes.head + sizes.tail + sizes.prompts < 0.15 * sizes.backbone, backbone
