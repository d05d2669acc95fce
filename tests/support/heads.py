"""A model with prompts at the cut, and its smashed data of a few images."""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor

from edge_client.data.batches import Augmentation, BatchReader
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.torch_model import TorchModel
from tests.support.edge import SMALL, device_model, image_set

# As wide as a real model: how a matrix product is rounded depends on its size.
WIDE = {"backbone": "vit_tiny_patch16_224"}

AT_CUT = SMALL.model_copy(update={**WIDE, "prompt_at": "cut", "cut": 2})

SAMPLES, TOKENS, WIDTH = 37, 5, 192

PLENTY = 10**8

EVERYTHING = np.arange(SAMPLES)


@functools.cache
def shared_model() -> TorchModel:
    return device_model(AT_CUT)


@functools.cache
def everything() -> Tensor:
    """Compute the smashed data of all samples in one call, [n, T, D]."""
    return outputs(shared_model()).smashed(EVERYTHING)


def reader(model: TorchModel, samples: int = SAMPLES, *, augmented: bool = False) -> BatchReader:
    augmentation = Augmentation(3) if augmented else None
    return BatchReader(image_set(samples), model.preprocessing, augmentation=augmentation)


def outputs(
    model: TorchModel, cache_bytes: int = PLENTY, *, augmented: bool = False
) -> HeadOutputs:
    return HeadOutputs(model, reader(model, augmented=augmented), cache_bytes)
