"""Runs on proxies over HTTP: the device's proxy, and the tuned whole backbone."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.participant import JoinedRun, Participant
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.messages import RunStatus, RunView
from protocol.plan import RunPlan
from split_model.backbone.libraries import timm
from split_model.backbone.tensor_file import write_tensors
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.export import load_exported
from split_server.federation.export import export_run, newest_state
from split_server.runtime.process import set_up_logging
from tests.integration.test_whole_model import WHOLE
from tests.support.edge import files, image_set
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer
from tuning_methods.proxies import distillation
from tuning_methods.sfprompt.local_body import build_local_body

LORA = {"tune": "lora", "lora_rank": 2}

PRUNED = {**LORA, "mlp_widths": (0, *[24] * 4, 0)}

KEPT_BLOCKS = [0, 2, 4, 5]

DROPPED = {**LORA, "blocks": tuple(KEPT_BLOCKS), "cut": 4, "lora_ends": 1}

DISTILLATION = {"epochs": 1, "samples": 8, "batch_size": 8}

WIDTH, MLP_WIDTH, CLASSIFIER = 64, 192, 3 * 65

BLOCK_PARAMETERS = 10 * WIDTH**2 + 12 * WIDTH

_keys = itertools.count()


def create_run(
    server: RunningServer,
    model: dict[str, Any],
    distillation: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    **training: Any,
) -> RunView:
    device_only = {"split_epochs": 0, "keep_fraction": 1, "local_epochs": 1, "batch_size": 5}
    settings = RunPlan.model_validate(
        {
            "model": {**WHOLE.model_dump(), **model},
            "federation": {"rounds": 1},
            "training": {**device_only, "tail_learning_rate": 0.01, **training},
            "method": {"distillation": distillation or {}, **(method or {})},
        }
    )
    return server.operator().create(settings, key=f"proxy-{next(_keys)}")


def take_part(server: RunningServer, folder: Path, run: RunView) -> JoinedRun:
    data = Dataset(image_set(10), image_set(7, seed=1))
    with contextlib.closing(Server(server.url)) as client:
        device = Participant(client, data, folder, "only", SilentReporter())
        participant = device.join(run.id, key="join-only")
        assert participant.take_part().status is RunStatus.FINISHED
    return participant


def backbone_with(state: dict[str, Tensor], blocks: list[int]) -> Any:
    """timm's whole model with the tuned LoRA products added to the weights of these blocks."""
    model = timm.create_model(WHOLE.backbone, img_size=32, num_classes=3).eval()
    weights = {n: t.clone() for n, t in open_backbone(files(WHOLE).backbone).items()}
    weights |= {f"head.{name}": state[f"tail.head.{name}"] for name in ("weight", "bias")}
    for place, number in enumerate(blocks):
        for role, row in (("q", 0), ("v", 2 * WIDTH)):
            prefix = f"head.blocks.{place}.attn.qkv.lora_{role}_"
            if f"{prefix}up" in state:
                change = state[f"{prefix}up"] @ state[f"{prefix}down"]
                weights[f"blocks.{number}.attn.qkv.weight"][row : row + WIDTH] += change
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("changes", "blocks", "tuned_blocks", "removed"),
    [
        (PRUNED, list(range(6)), 6, 4 * (MLP_WIDTH - 24) * (2 * WIDTH + 1)),
        (DROPPED, KEPT_BLOCKS, 2, 2 * BLOCK_PARAMETERS),
    ],
    ids=["pruned", "dropped"],
)
def test_a_run_on_a_proxy_tunes_the_whole_backbone(
    server: RunningServer,
    data_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    blocks: list[int],
    tuned_blocks: int,
    removed: int,
) -> None:
    run = create_run(server, changes, DISTILLATION)
    participant = take_part(server, tmp_path / "device", run)
    _, state = newest_state(data_dir, run.id)
    tuned = sum(tensor.numel() for tensor in state.values())
    assert tuned == tuned_blocks * 2 * 2 * 2 * WIDTH + CLASSIFIER
    assert all(t.any() for t in state.values()), "training changed each tensor"
    # The head file has the backbone's parameters but for those that the proxy lacks; LoRA and
    # classifier are in the state.
    whole = 3 * 256 * WIDTH + WIDTH + 6 * WIDTH + 6 * BLOCK_PARAMETERS + 2 * WIDTH
    assert 0 <= run.head.nbytes - 4 * (whole - removed) <= 40_000
    assert run.backbone_bytes == 4 * (whole + CLASSIFIER)

    out = tmp_path / "model.safetensors"
    export_run(data_dir, run.id, out)
    model = participant.model
    images, _ = read(BatchReader(image_set(7, seed=1), model.preprocessing), range(7))
    with torch.no_grad():
        expected = backbone_with(state, blocks)(images)
        torch.testing.assert_close(load_exported(out)(images), expected, rtol=0, atol=1e-5)
        proxy_logits = model.tail(model.head(images))
    assert (proxy_logits - expected).abs().max() > 1e-3


def test_equal_proxies_are_distilled_once(
    server: RunningServer, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first, second = (
            create_run(server, PRUNED, {**DISTILLATION, "samples": 9}) for _ in range(2)
        )
    assert first.head == second.head
    messages = [
        record.message for record in caplog.records if "distillation, epoch" in record.message
    ]
    assert len(messages) == 1
    assert create_run(server, PRUNED, {**DISTILLATION, "samples": 7}).head != first.head
    assert create_run(server, PRUNED).head != first.head


def test_the_server_s_log_names_each_epoch() -> None:
    names = ("split_server", "split_model", "tuning_methods", "uvicorn")
    before = {name: vars(logging.getLogger(name)).copy() for name in names}
    access = logging.getLogger("uvicorn.access").disabled
    log = io.StringIO()
    try:
        with contextlib.redirect_stderr(log):
            set_up_logging("info")
            logging.getLogger(distillation.__name__).info("distillation, epoch 1 of 5")
    finally:
        logging.getLogger("uvicorn.access").disabled = access
        for name, attributes in before.items():
            vars(logging.getLogger(name)).update(attributes)
            logging.getLogger(name).setLevel(attributes["level"])  # clears the logger's cache
    assert "epoch 1 of 5" in log.getvalue()


def test_a_server_distils_on_its_own_images(server: RunningServer, data_dir: Path) -> None:
    with_images = {**DISTILLATION, "images": "held"}
    with pytest.raises(
        AssertionError, match=r'"field":"method.distillation.images"'
    ):  # by `create`
        create_run(server, PRUNED, with_images)
    pixels = torch.from_numpy(np.stack([image_set(9).image(number) for number in range(9)]))
    write_tensors(data_dir / "distillation" / "held.safetensors", {"images": pixels})
    run = create_run(server, PRUNED, with_images)
    assert run.head != create_run(server, PRUNED, DISTILLATION).head
    write_tensors(data_dir / "distillation" / "held.safetensors", {"images": pixels.flip(0) // 2})
    assert create_run(server, PRUNED, with_images).head != run.head, (
        "other images give another proxy"
    )


def test_local_updates_use_a_small_body_that_comes_with_the_head(
    server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    cut = {"cut": 1, "prompt_count": 2}
    split = {"split_epochs": 1, "keep_fraction": 0.5}
    plain = create_run(server, cut, **split)
    run = create_run(server, cut, DISTILLATION, {"local_body": 2}, **split)
    assert (
        4 * 2 * BLOCK_PARAMETERS
        <= run.head.nbytes - plain.head.nbytes
        <= 4 * 2 * BLOCK_PARAMETERS + 20_000
    )
    assert run.state == plain.state
    participant = take_part(server, tmp_path / "device", run)
    body = build_local_body(participant.model.head.settings, 2, participant.model.extras)
    assert sum(parameter.numel() for parameter in body.parameters()) == 2 * BLOCK_PARAMETERS
    assert not any(parameter.requires_grad for parameter in body.parameters())
    with torch.no_grad():
        _, state = newest_state(data_dir, run.id)
    classifier = {"tail.head.weight", "tail.head.bias"}
    assert set(state) == {"prompts", "tail.norm.weight", "tail.norm.bias"} | classifier
