"""Runs on proxies over HTTP: what the device gets, and what of it ends up in the whole backbone."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.data import BatchReader, Dataset
from edge_client.participant import JoinedRun, Participant
from edge_client.transport import Server
from protocol.messages import RunStatus, RunView
from protocol.plan import RunPlan
from split_model import load_exported, open_backbone
from split_model.backbone.libraries import timm
from split_model.backbone.tensor_file import write_tensors
from split_server.federation.export import export_run, newest_state
from split_server.runtime.process import set_up_logging
from tests.integration.test_whole_model import WHOLE
from tests.support.edge import files, image_set
from tests.support.server import RunningServer
from tuning_methods.proxies import distillation
from tuning_methods.sfprompt.device import SFPromptPaperDevice

LORA = {"tune": "lora", "lora_rank": 2}

PRUNED = {**LORA, "proxy": "pruned", "proxy_width": 96}

DROPPED = {**LORA, "proxy": "dropped", "proxy_blocks": 4, "cut": 4, "lora_ends": 1}

KEPT = [0, 3, 8, 11]  # by hand: the ends, and the middles of two halves of 1 … 10

DISTILLED = {"epochs": 1, "samples": 8, "batch_size": 8}

WIDTH, CLASSIFIER = 192, 3 * 193

LAYERS = 12 * WIDTH**2 + 13 * WIDTH  # of one block


_keys = itertools.count()


def created(
    server: RunningServer,
    model: dict[str, Any],
    distillation: dict[str, Any] | None = None,
    **training: Any,
) -> RunView:
    alone = {"split_epochs": 0, "keep_fraction": 1, "local_epochs": 1, "batch_size": 5}
    settings = RunPlan.model_validate(
        {
            "model": {**WHOLE.model_dump(), **model},
            "federation": {"rounds": 1},
            "training": {**alone, "tail_learning_rate": 0.01, **training},
            "distillation": distillation or {},
        }
    )
    return server.operator().create(settings, key=f"proxy-{next(_keys)}")


class RecordingWatcher:
    def event(self, kind: str, **data: Any) -> None:
        pass

    def advance(self, phase: str, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


def take_part(server: RunningServer, folder: Path, run: RunView) -> JoinedRun:
    data = Dataset(image_set(10), image_set(7, seed=1))
    with contextlib.closing(Server(server.url)) as client:
        device = Participant(client, data, folder, "only", RecordingWatcher())
        participant = device.join(run.id, key="join-only")
        assert participant.take_part().status is RunStatus.FINISHED
    return participant


def backbone_with(state: dict[str, Tensor], blocks: list[int]) -> Any:
    """timm's whole model, the tuned changes added to its weights; the proxy's blocks by place."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval()
    weights = {n: t.clone() for n, t in open_backbone(files(WHOLE).backbone).items()}
    weights |= {f"head.{own}": state[f"tail.head.{own}"] for own in ("weight", "bias")}
    for place, number in enumerate(blocks):
        for role, row in (("q", 0), ("v", 2 * WIDTH)):
            own = f"head.blocks.{place}.attn.qkv.lora_{role}_"
            if f"{own}up" in state:
                change = state[f"{own}up"] @ state[f"{own}down"]
                weights[f"blocks.{number}.attn.qkv.weight"][row : row + WIDTH] += change
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("changes", "blocks", "tuned_blocks", "lost"),
    [
        (PRUNED, list(range(12)), 12, 10 * (768 - 96) * (2 * WIDTH + 1)),
        (DROPPED, KEPT, 2, 8 * LAYERS),
    ],
    ids=["pruned", "dropped"],
)
def test_a_run_on_a_proxy_ends_in_the_whole_backbone(
    server: RunningServer,
    data_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    blocks: list[int],
    tuned_blocks: int,
    lost: int,
) -> None:
    run = created(server, changes, DISTILLED)
    participant = take_part(server, tmp_path / "device", run)
    _, state = newest_state(data_dir, run.id)
    tuned = sum(tensor.numel() for tensor in state.values())
    assert tuned == tuned_blocks * 2 * 2 * 2 * WIDTH + CLASSIFIER
    assert all(t.any() for t in state.values()), "every tensor has moved"
    # The backbone's numbers less what the proxy lacks; LoRA and classifier are in the state.
    whole = 3 * 256 * WIDTH + WIDTH + 6 * WIDTH + 12 * LAYERS + 2 * WIDTH
    assert 0 <= run.head.nbytes - 4 * (whole - lost) <= 40_000
    assert run.backbone_bytes == 4 * (whole + CLASSIFIER)

    out = tmp_path / "model.safetensors"
    export_run(data_dir, run.id, out)
    model = participant.model
    images, _ = BatchReader(image_set(7, seed=1), model.preprocessing).read(range(7))
    with torch.no_grad():
        expected = backbone_with(state, blocks)(images)
        torch.testing.assert_close(load_exported(out)(images), expected, rtol=0, atol=1e-5)
        of_proxy = model.tail(model.head(images))
    assert (of_proxy - expected).abs().max() > 1e-3


def test_an_equal_proxy_is_made_once(
    server: RunningServer, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first, second = (created(server, PRUNED, {**DISTILLED, "samples": 9}) for _ in range(2))
    assert first.head == second.head
    said = [record.message for record in caplog.records if "distillation, epoch" in record.message]
    assert len(said) == 1
    assert created(server, PRUNED, {**DISTILLED, "samples": 7}).head != first.head
    assert created(server, PRUNED).head != first.head


def test_the_server_s_log_tells_of_every_epoch() -> None:
    names = ("split_server", "split_model", "uvicorn")
    before = {name: vars(logging.getLogger(name)).copy() for name in names}
    access = logging.getLogger("uvicorn.access").disabled
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            set_up_logging("info")
            logging.getLogger(distillation.__name__).info("distillation, epoch 1 of 5")
    finally:
        logging.getLogger("uvicorn.access").disabled = access
        for name, found in before.items():
            vars(logging.getLogger(name)).update(found)
            logging.getLogger(name).setLevel(found["level"])  # forgets what it has cached
    assert "epoch 1 of 5" in heard.getvalue()


def test_a_server_distils_on_the_images_that_it_holds(
    server: RunningServer, data_dir: Path
) -> None:
    named = {**DISTILLED, "images": "held"}
    with pytest.raises(AssertionError, match=r'"field":"distillation.images"'):  # of the double
        created(server, PRUNED, named)
    pixels = torch.stack([image_set(9).image(one) for one in range(9)])
    write_tensors(data_dir / "distillation" / "held.safetensors", {"images": pixels})
    held = created(server, PRUNED, named)
    assert held.head != created(server, PRUNED, DISTILLED).head
    write_tensors(data_dir / "distillation" / "held.safetensors", {"images": pixels.flip(0) // 2})
    assert created(server, PRUNED, named).head != held.head, "other images, another proxy"


def test_a_small_body_comes_with_the_head_and_local_updates_run_through_it(
    server: RunningServer, data_dir: Path, tmp_path: Path
) -> None:
    cut = {"cut": 1, "prompt_count": 2}
    split = {"split_epochs": 1, "keep_fraction": 0.5}
    plain = created(server, cut, **split)
    run = created(server, {**cut, "local_body": 2}, DISTILLED, **split)
    assert 4 * 2 * LAYERS <= run.head.nbytes - plain.head.nbytes <= 4 * 2 * LAYERS + 20_000
    assert run.state == plain.state
    participant = take_part(server, tmp_path / "device", run)
    body = SFPromptPaperDevice().local_body(participant.model)
    assert body is not None
    assert sum(own.numel() for own in body.parameters()) == 2 * LAYERS
    assert not any(own.requires_grad for own in body.parameters())
    with torch.no_grad():
        _, made = newest_state(data_dir, run.id)
    assert set(made) == {"prompts", "tail.norm.weight", "tail.norm.bias", *_classifier()}


def _classifier() -> list[str]:
    return ["tail.head.weight", "tail.head.bias"]
