"""The device's part of a run's model, whichever library computes it; never the server's body."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from edge_client.data.batches import Interpolation, Preprocessing
from edge_client.data.pictures import parse_colour
from protocol.errors import InvalidField, MalformedFrame
from protocol.limits import DEFAULT_LIMITS, MIB
from protocol.messages import RunView
from protocol.plan import ModelPlan
from protocol.wire import FLOAT32_BYTES
from split_model.checkpoints.metadata import ImagePreparation
from split_model.errors import (
    ModelPlanError,
    TensorFileError,
    UnsupportedBackboneError,
    WeightsMismatchError,
)

Floats = NDArray[np.float32]

State = dict[str, Floats]  # tuned tensors, by the names of a state

Compute = Literal["auto", "numpy", "torch"]

_HEADER_BYTES = MIB

_CLASSIFIER_ALONE = "edge_client.method:DeviceMethod"  # it runs no other method's code

# What reading a damaged or foreign file raises.
UNUSABLE = (TensorFileError, ModelPlanError, UnsupportedBackboneError, WeightsMismatchError)


class Model(ABC):
    """Head and tail on the device.

    Attributes:
        settings: the model's plan.
        preprocessing: turns images into the head's inputs.
        tokens: of one sample's smashed data, without prompts.
        width: features of a token.
        cached_tokens: of a sample, which the tail reads at the cut; 0: none are kept.
        is_whole: whether head and tail are the whole model.
    """

    settings: ModelPlan
    preprocessing: Preprocessing
    tokens: int
    width: int
    cached_tokens: int
    is_whole: bool

    @abstractmethod
    def smashed(self, images: Floats) -> Floats:
        """Compute the smashed data [B, T, D] of images [B, 3, S, S]."""

    @abstractmethod
    def for_tail(self, smashed: Floats) -> Floats:
        """Reduce smashed data [B, T, D] to the tokens that the tail reads, [B, T', D]."""

    @abstractmethod
    def classify(self, inferred: Floats) -> Floats:
        """Return logits [B, C] of what an inference returned: features, or logits already."""

    @property
    @abstractmethod
    def classifier(self) -> tuple[Floats, Floats]:
        """Weight [C, F] and bias [C] of a linear tail."""

    @abstractmethod
    def set_classifier(self, weight: NDArray[np.floating], bias: NDArray[np.floating]) -> None:
        """Replace weight [C, F] and bias [C] of a linear tail."""

    @abstractmethod
    def load_global_state(self, state_file: Path) -> None:
        """Replace the tuned tensors by a global state's.

        Raises:
            MalformedFrame: the file is damaged, or of another model.
        """

    @abstractmethod
    def state(self) -> State:
        """Return copies of the tuned tensors."""

    @abstractmethod
    def feature_shape(self, pooled: bool) -> tuple[int, int]:
        """Return the shape [T', D'] of one sample's features on the wire.

        Args:
            pooled: whether only what the tail reads crosses the network.
        """

    def samples_per_frame(self, limit: int) -> int:
        """Return the number of samples, at most ``limit``, whose float32 features fit in a frame.

        Counts the body's tokens, prompts included: a response may be larger than its request.
        """
        tokens = self.tokens + self.settings.prompt_count
        sample_bytes = tokens * self.width * FLOAT32_BYTES
        return max(1, min(limit, (DEFAULT_LIMITS.max_frame_bytes - _HEADER_BYTES) // sample_bytes))


def needs_torch(run: RunView) -> bool:
    """Whether a device trains more than a linear classifier in this run, or merges tokens."""
    model, plan = run.plan.model, run.plan
    return not (
        model.depths
        and model.prompt_at == "cut"
        and plan.wire.keep_smashed
        and not plan.training.split_epochs
        and not model.keep_tokens
        and not model.is_reshaped
        and run.settings.method.device == _CLASSIFIER_ALONE
    )


def check_compute(run: RunView, compute: Compute) -> None:
    """Refuse a run that this installation cannot take part in, before anything is downloaded.

    Raises:
        InvalidField: the run needs torch, which is not installed or not allowed.
    """
    if compute == "torch" or (compute == "auto" and needs_torch(run)):
        require_torch(f"the method {run.settings.method.name} with these settings")
    elif compute == "numpy" and needs_torch(run):
        raise InvalidField(
            "this run trains on the device, for which NumPy alone does not suffice",
            field="compute",
            limit="auto or torch",
            value=compute,
        )


def require_torch(purpose: str) -> None:
    """Raise `InvalidField` unless torch and timm are installed.

    Args:
        purpose: what needs them.
    """
    if not (_is_installed("torch") and _is_installed("timm")):
        raise InvalidField(
            f"{purpose} needs torch and timm on the device, which are not installed",
            field="compute",
            limit="a run whose devices train a classifier alone (the default form)",
            hint='pip install "sfprompt[device-torch]"',
        )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # what an installation that is only partly there raises
        return False


def load_model(run: RunView, head_file: Path, state_file: Path, compute: Compute) -> Model:
    """Load the device's part of a run's model from the server's files.

    Args:
        run: the run.
        head_file: the head.
        state_file: the global state.
        compute: the library that computes; auto: NumPy, in each run in which it suffices.

    Raises:
        MalformedFrame: a file is damaged, or the head is of another model than the run's.
        InvalidField: the run needs torch, which is not installed or not allowed.
    """
    check_compute(run, compute)
    if compute != "torch" and not needs_torch(run):
        from edge_client.linear_model import LinearModel

        model = LinearModel.load(run.plan.model, head_file, state_file)
        if model is not None:
            return model
        require_torch(f"the head of {run.plan.model.backbone}")
    from edge_client.torch_model import TorchModel  # torch takes seconds to import

    return TorchModel.load(run.plan.model, head_file, state_file)


def preprocessing_of(split: ModelPlan, images: ImagePreparation) -> Preprocessing:
    """Return the preprocessing: as the backbone was trained, and as the run's settings fit images.

    Raises:
        PreprocessingError: the backbone uses an interpolation that is not supported here.
    """
    interpolation = cast(Interpolation, images.interpolation)
    return Preprocessing(
        split.image_size,
        images.mean,
        images.std,
        interpolation,
        split.fit,
        parse_colour(split.background),
    )


def unusable(file: Path, error: Exception) -> MalformedFrame:
    """Return the error for a file of the server that cannot be used."""
    return MalformedFrame(f"a file of the server cannot be used: {error}", value=str(file))
