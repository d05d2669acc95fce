"""The local body: copies of the body's blocks, distilled to approximate its features."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from split_model.backbone.weights import prepare_backbone
from split_model.checkpoints.head_file import extra_tensors, read_head_file, write_head_file
from split_model.checkpoints.state import initial_state
from split_model.parts.build import build_body, build_head
from tests.support.uncut_model import random_model, reduced, refused_field
from tuning_methods.proxies.settings import DistillationSettings
from tuning_methods.sfprompt.local_body import LocalBody, build_local_body, distil_local_body

DEPTH = 6

CUT = reduced("vit_base_patch16_224").replace(
    cut=1,
    model_overrides=(("depth", DEPTH), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8)),
)

BLOCKS = 2

SETTINGS = DistillationSettings(epochs=4, batch_size=8, learning_rate=3e-3)


def images() -> Tensor:
    return torch.randn(24, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_an_undistilled_local_body_consists_of_the_bodys_blocks() -> None:
    model = random_model(CUT)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    tensors = distil_local_body(BLOCKS, CUT, weights, images()[:0], DistillationSettings(), seed=0)
    tokens = torch.randn(2, 1 + 9, 32, generator=torch.Generator().manual_seed(2))
    # Of the body's blocks 1 … 5, the middle ones of two halves: 2 and 4.
    expected = model.blocks[4](model.blocks[2](tokens))
    assert torch.allclose(build_local_body(CUT, BLOCKS, tensors)(tokens), expected, atol=1e-5)
    prompted = torch.cat([tokens, tokens[:, :3]], dim=1)
    assert build_local_body(CUT, BLOCKS, tensors)(prompted).shape == (2, 13, 32)


def test_distillation_lowers_the_local_bodys_error() -> None:
    weights = {n: t.clone() for n, t in random_model(CUT).state_dict().items()}
    before = {n: t.clone() for n, t in weights.items()}
    with torch.no_grad():
        smashed = build_head(CUT, weights)(images())
        features = build_body(CUT, weights)(smashed)

    def error(distillation: DistillationSettings) -> float:
        body = build_local_body(
            CUT, BLOCKS, distil_local_body(BLOCKS, CUT, weights, images(), distillation, seed=0)
        )
        assert not any(p.requires_grad for p in body.parameters())
        with torch.no_grad():
            return float((body(smashed) - features).square().mean())

    assert error(SETTINGS) < 0.8 * error(DistillationSettings())
    assert all(torch.equal(weights[n], t) for n, t in before.items())


def test_the_head_file_carries_the_local_body_and_the_state_does_not(tmp_path: Path) -> None:
    file = prepare_backbone(CUT, "random:1", tmp_path)
    weights = dict(random_model(CUT).state_dict())
    tensors = distil_local_body(BLOCKS, CUT, weights, images()[:0], DistillationSettings(), seed=0)
    path, _ = write_head_file(CUT, file.path, tmp_path / "head", "float32", tensors)
    _, _, frozen = read_head_file(path)
    extras = extra_tensors(frozen)
    assert extras.keys() == tensors.keys()
    assert all(torch.equal(extras[n], t) for n, t in tensors.items())
    assert not initial_state(CUT, weights, seed=0).keys() & tensors.keys()


@pytest.mark.parametrize(
    ("num_blocks", "changes"), [(DEPTH, {}), (BLOCKS, {"backbone": "beit_base_patch16_224"})]
)
def test_a_local_body_without_a_matching_body_is_refused(
    num_blocks: int, changes: dict[str, object]
) -> None:
    settings = CUT.replace(**changes)
    assert refused_field(lambda: LocalBody(settings, num_blocks)) == "local_body"
