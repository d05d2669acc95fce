"""The head in NumPy equals timm's, for every backbone that is described to devices."""

from typing import Any

import numpy as np
import pytest
import torch

from edge_client.head.head import NumpyHead
from split_model.backbone.architecture import skeleton, supported_backbones
from split_model.checkpoints.architecture import describe
from split_model.parts.build import build_head
from tests.support.uncut_model import random_model, reduced, signature

TOLERANCE = 1e-5

NEED_TORCH = ("ParallelScalingBlock", "ParallelThingsBlock", "DiffParallelScalingBlock")

_verified: set[int] = set()


def needs_torch(model: Any) -> bool:
    """Whether it has a convolutional stem, or parallel or differential attention."""
    block = model.blocks[0]
    return (
        hasattr(model.patch_embed, "backbone")
        or type(block).__name__ in NEED_TORCH
        or type(block.attn).__name__ == "DiffAttention"
    )


@pytest.mark.parametrize("name", supported_backbones())
def test_head_equals_timms(name: str) -> None:
    settings = reduced(name).replace(cut=2)
    model = skeleton(settings)
    kind = signature(model)
    if kind in _verified:
        return  # the same model as a name before it, at this size
    architecture = describe(settings)
    assert (architecture is None) == needs_torch(model)
    _verified.add(kind)
    if architecture is None:
        return
    weights = random_model(settings).state_dict()
    side = settings.image_size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = build_head(settings, weights)(images).numpy()
    tensors = {name: tensor.numpy() for name, tensor in weights.items()}
    smashed = NumpyHead(architecture, tensors, settings.cut)(images.numpy())
    error = np.abs(smashed - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE
