"""How well a global state classifies held-out images: counts of a device, figures of a run.

Devices send counts by class and by confidence, never the label of an image.
"""

from __future__ import annotations

import itertools
from typing import Annotated

from pydantic import Field, model_validator

from protocol.base import Message

__all__ = [
    "CONFIDENCE_BINS",
    "MAX_CELLS",
    "ClassQuality",
    "ConfidenceBin",
    "DeviceQuality",
    "EvaluationView",
    "PredictionCounts",
    "Quality",
]

CONFIDENCE_BINS = 15  # of equal width, as Guo et al. (ICML 2017) count calibration

MAX_CELLS = 20_000  # of a confusion matrix that are not 0; a device with more sends no counts

_Class = Annotated[int, Field(ge=0, lt=2**31)]

_Samples = Annotated[int, Field(ge=0, lt=2**53)]

_Share = Annotated[float, Field(ge=0, le=1)]


class ConfidenceBin(Message):
    """The predictions whose confidence, the probability of the predicted class, is in one bin."""

    samples: _Samples = 0
    correct: _Samples = 0
    confidence_sum: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _check_sums(self) -> ConfidenceBin:
        if self.correct > self.samples:
            raise ValueError(f"correct ({self.correct}) is above samples ({self.samples})")
        if self.confidence_sum > self.samples * (1 + 1e-6):
            raise ValueError(f"confidence_sum is above samples ({self.samples})")
        return self


class PredictionCounts(Message):
    """A device's predictions of its held-out images.

    Attributes:
        confusion: class, predicted class and number of images, without zeros, ascending.
        bins: by confidence; bin i holds confidences in (i / n, (i + 1) / n].
    """

    confusion: Annotated[
        tuple[tuple[_Class, _Class, Annotated[int, Field(ge=1, lt=2**53)]], ...],
        Field(max_length=MAX_CELLS),
    ]
    bins: Annotated[
        tuple[ConfidenceBin, ...], Field(min_length=CONFIDENCE_BINS, max_length=CONFIDENCE_BINS)
    ]

    @property
    def samples(self) -> int:
        """The number of images."""
        return sum(count for _, _, count in self.confusion)

    @property
    def correct(self) -> int:
        """The number of images of which the predicted class is the class."""
        return sum(count for label, predicted, count in self.confusion if label == predicted)

    @model_validator(mode="after")
    def _check_counts(self) -> PredictionCounts:
        cells = [cell[:2] for cell in self.confusion]
        if any(after <= before for before, after in itertools.pairwise(cells)):
            raise ValueError("confusion must be ascending, each pair of classes once")
        for field in ("samples", "correct"):
            total = sum(getattr(each, field) for each in self.bins)
            if total != getattr(self, field):
                raise ValueError(f"{field} of confusion and bins differ")
        return self


class ClassQuality(Message):
    """How one class is recognised.

    Attributes:
        name: of the class.
        samples: images of the class.
        predicted: images predicted as the class.
        recall: share of its images that are recognised; None: it has none.
        precision: share of the predictions that are right; None: there is none.
    """

    name: str
    samples: _Samples
    predicted: _Samples
    recall: _Share | None = None
    precision: _Share | None = None


class Quality(Message):
    """How well a state classifies a set of held-out images.

    Attributes:
        samples: number of images.
        accuracy: share that is recognised.
        loss: mean cross-entropy, in nats.
        majority: share of the most frequent class: the accuracy of always predicting it.
        balanced_accuracy: mean recall of the classes that have images; None: no counts.
        macro_f1: mean F1 of the classes that have images or predictions; None: no counts.
        calibration_error: mean distance of confidence and accuracy in a bin (ECE; Guo et al.,
            ICML 2017); None: no counts.
    """

    samples: _Samples
    accuracy: _Share
    loss: float
    majority: _Share | None = None
    balanced_accuracy: _Share | None = None
    macro_f1: _Share | None = None
    calibration_error: _Share | None = None


class DeviceQuality(Message):
    """How well a state classifies the images of one device."""

    participant: str
    name: str
    quality: Quality


class EvaluationView(Message):
    """The evaluation of a round's state, over all images and on each device.

    Attributes:
        round: that produced the state.
        quality: over the images of all devices together; None: no device has evaluated it.
        devices: in order of their names.
        classes: of the images of all devices; empty: no counts.
        confusion: class, predicted class and number of images, without zeros, ascending.
    """

    round: _Samples
    quality: Quality | None = None
    devices: tuple[DeviceQuality, ...] = ()
    classes: tuple[ClassQuality, ...] = ()
    confusion: tuple[tuple[_Class, _Class, _Samples], ...] = ()
