"""Parts of a run's settings. A plan has the same parts with further fields."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from protocol.base import Message
from protocol.codec_names import check_float_codec
from protocol.errors import UnknownCodec
from protocol.labels import LabelUse, label_epsilon

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


# In Unicode normal form C: macOS writes folder names in form D, and editors write settings in C.
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
    image_size: int = Field(56, ge=8, le=2048, description="side of the model's input in pixels")
    fit: Fit = Field(
        "crop",
        description="how an image that is not square becomes square: crop to its centre | pad with "
        "the background | stretch",
    )
    background: str = Field(
        "#ffffff",
        pattern="^#[0-9a-f]{6}$",
        description="colour of padding and behind transparent parts of an image, #RRGGBB in lower "
        "case",
    )
    num_classes: int = Field(
        10, ge=2, le=100_000, description="number of classes of all devices together"
    )


class TrainingSettings(Message):
    """Optimisation of the tuned parameters on the devices and on the server."""

    batch_size: int = Field(32, ge=1, le=4096, description="samples in each step of a device")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "adamw", description="optimiser of prompts, tail and other tuned parameters"
    )
    prompt_learning_rate: float = Field(
        5e-3, ge=0, le=100, description="learning rate of the prompts"
    )
    tail_learning_rate: float = Field(
        2e-3, ge=0, le=100, description="learning rate of all tuned parameters except the prompts"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    nesterov: bool = Field(False, description="whether sgd uses Nesterov momentum")
    weight_decay: float = Field(
        0.0, ge=0, le=10, description="weight decay of all tuned parameters except the prompts"
    )
    proximal: float = Field(
        0.0,
        ge=0,
        le=100,
        description="mu of FedProx, the penalty on the distance from the round's global state",
    )
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="schedule of the learning rates over all rounds"
    )
    warmup_rounds: int = Field(
        0, ge=0, le=10_000, description="rounds in which the learning rates rise from 0"
    )
    augment: bool = Field(False, description="flip and shift training images")
    views: int = Field(
        4,
        ge=1,
        le=1000,
        description="number of augmented views of a sample with cached smashed data",
    )

    validation_share: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="share of each device's training images that select the best state "
        "and are not trained on; none: 0.1 where prompts are tuned after a closed-form start, "
        "else 0",
    )
    labels: LabelUse = Field(
        "device",
        description="device: labels stay on their device, but what it sends reveals most of them | "
        "noised:E: a device replaces some training labels at random, local differential privacy "
        "with epsilon E | shared: a device sends its samples and labels once, and the server tunes "
        "and evaluates without it; devices join such a run with --share-labels alone",
    )
    report_classes: bool | None = Field(
        None,
        description="devices report how many held-out images of each class they predict as which "
        "class, and how confidently; false: only how many they predict right; none: true unless "
        "labels are noised",
    )

    @property
    def reports_classes(self) -> bool:
        """Whether devices report their predictions by class."""
        noised = label_epsilon(self.labels) is not None
        return not noised if self.report_classes is None else self.report_classes

    @model_validator(mode="after")
    def _check_nesterov(self) -> TrainingSettings:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer = sgd and a momentum above 0")
        return self


class WireSettings(Message):
    """The codec of each kind of tensor on the wire."""

    smashed: CodecName = Field("float32", description="output of the head")
    features: CodecName = Field("float32", description="output of the body in training")
    gradients: CodecName = Field("float32", description="gradients of features and of smashed data")
    inference: CodecName = Field(
        "float32",
        description="output of the body in evaluation and prediction; rounding costs accuracy",
    )
    inference_smashed: CodecName | None = Field(
        None,
        description="smashed data of held-out images and of predictions; with float16 the "
        "accuracy is that of the exported model; none: as smashed",
    )
    start: CodecName = Field(
        "float32", description="features of round 0, sent once for each sample (depths above 0)"
    )
    updates: CodecName = Field("float32", description="update of a device: tail and prompts")
    update_deltas: bool = Field(
        False,
        description="send global states and updates as changes, not as whole tensors",
    )
    head: Literal["float32", "float16", "int8", "int4"] = Field(
        "float32",
        description="weights of the frozen head, downloaded once; int4: matrices in 4 bits, "
        "all other weights as with int8",
    )
    pooled_features: bool = Field(
        False,
        description="send only the tokens that the tail reads, if these are the first ones",
    )
    stochastic_rounding: bool = Field(
        False, description="round gradients at random, if their codec rounds"
    )
