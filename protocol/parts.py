"""The parts of a run's settings that people write, and that a plan extends."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from protocol.base import Message
from protocol.codec_names import check_float_codec
from protocol.errors import UnknownCodec

__all__ = [
    "BackboneSettings",
    "ClassName",
    "CodecName",
    "Fit",
    "Text",
    "TrainingSettings",
    "WireSettings",
]

Text = Annotated[str, Field(min_length=1, max_length=200)]

Fit = Literal["crop", "pad", "stretch"]


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


# In Unicode normal form C: macOS writes folder names in form D, and people write settings in C.
ClassName = Annotated[Text, AfterValidator(_compose)]


def _known_codec(name: str) -> str:
    try:
        return check_float_codec(name)
    except UnknownCodec as error:
        limit = error.limit if isinstance(error.limit, list) else [str(error.limit)]
        raise PydanticCustomError(
            "unknown_codec", "{reason}", {"reason": error.message, "expected": ", ".join(limit)}
        ) from error


CodecName = Annotated[str, AfterValidator(_known_codec)]


class BackboneSettings(Message):
    """The pretrained model."""

    backbone: Text = Field("vit_small_patch14_dinov2", description="timm's name of the model")
    weights: Text = Field(
        "packaged",
        description="packaged | hub | file:PATH (on the server) | random:SEED (untrained)",
    )
    image_size: int = Field(56, ge=8, le=2048, description="pixels a side")
    fit: Fit = Field(
        "crop",
        description="how an image that is not square becomes square: crop to its centre | pad with "
        "the background | stretch",
    )
    background: str = Field(
        "#ffffff",
        pattern="^#[0-9a-f]{6}$",
        description="colour behind transparent parts of an image and of padding, #RRGGBB in lower "
        "case",
    )
    num_classes: int = Field(10, ge=2, le=100_000, description="classes of all devices together")


class TrainingSettings(Message):
    """How tuned parameters are optimised on the devices and on the server."""

    batch_size: int = Field(32, ge=1, le=4096, description="samples a step, on each device")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "adamw", description="of prompts, tail and other tuned parameters"
    )
    prompt_learning_rate: float = Field(5e-3, ge=0, le=100, description="of the prompts")
    tail_learning_rate: float = Field(
        2e-3, ge=0, le=100, description="of all tuned parameters but the prompts"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="Nesterov momentum, of sgd")
    weight_decay: float = Field(0.0, ge=0, le=10, description="of all but the prompts")
    proximal: float = Field(
        0.0, ge=0, le=100, description="FedProx's mu: pull to the round's global state"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="of the learning rates over the rounds of the run"
    )
    warmup_rounds: int = Field(
        0, ge=0, le=10_000, description="rounds in which the learning rates rise from 0"
    )
    augment: bool = Field(False, description="flip and shift training images")
    views: int = Field(
        4, ge=1, le=1000, description="augmented views of a sample whose smashed data are cached"
    )

    validation_share: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="share of each device's training images, by class, that select the best state "
        "and are not trained on; none: 0.1 where prompts are tuned after a closed-form start, "
        "else 0",
    )
    label_epsilon: float | None = Field(
        None,
        gt=0,
        le=100,
        description="local differential privacy of training labels: each device replaces some at "
        "random before it trains; none: none",
    )

    @model_validator(mode="after")
    def _check_nesterov(self) -> TrainingSettings:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer = sgd and a momentum above 0")
        return self


class WireSettings(Message):
    """The codec of each kind of tensor on the wire."""

    smashed: CodecName = Field("float32", description="output of the head, to the server")
    features: CodecName = Field("float32", description="output of the body, in training")
    gradients: CodecName = Field("float32", description="of features and of smashed data")
    inference: CodecName = Field(
        "float32", description="features of evaluation and prediction: rounding costs accuracy"
    )
    start: CodecName = Field(
        "float32", description="features of round 0, once for each training sample (depths)"
    )
    updates: CodecName = Field("float32", description="tail and prompts from a device")
    update_deltas: bool = Field(
        False, description="send a state as its change against the round's, both ways"
    )
    head: Literal["float32", "float16", "int8", "int4"] = Field(
        "float32",
        description="the frozen head's weights, downloaded once; int4: matrices in 4 bits, "
        "the rest as with int8",
    )
    pooled_features: bool = Field(
        False, description="return only the tokens that the tail reads, if it reads the first ones"
    )
    stochastic_rounding: bool = Field(False, description="of the gradients, if their codec rounds")
