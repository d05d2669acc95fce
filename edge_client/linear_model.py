"""The device's part of the model in NumPy: a frozen head, and a linear classifier as the tail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.data.batches import Preprocessing
from edge_client.head.file import ArrayFile, Weights
from edge_client.head.head import NumpyHead
from edge_client.model import UNUSABLE, Floats, Model, State, preprocessing_of, unusable
from edge_client.storage.states import check_shapes, load_state
from protocol.architecture import Architecture
from protocol.errors import MalformedFrame
from protocol.plan import ModelPlan
from split_model.checkpoints.metadata import (
    head_plan,
    read_architecture,
    read_plan,
    read_preparation,
)
from split_model.errors import TensorFileError

_WEIGHT, _BIAS = "tail.head.weight", "tail.head.bias"  # names in a state


class LinearModel(Model):
    """A frozen head, and a linear classifier of what the body gives at several depths.

    Args:
        settings: the model's plan, with ``depths``.
        head: of the plan.
        preprocessing: of the head's images.
        state: the global state.

    Raises:
        WeightsMismatchError: the state is of another model.
    """

    def __init__(
        self, settings: ModelPlan, head: NumpyHead, preprocessing: Preprocessing, state: State
    ) -> None:
        self.settings = settings
        self.preprocessing = preprocessing
        self._head = head
        self.tokens, self.width = head.architecture.tokens, head.architecture.width
        self.cached_tokens = 0
        self.is_whole = False
        tokens, width = self.feature_shape(True)
        classes = settings.num_classes
        self._shapes = {_WEIGHT: (classes, tokens * width), _BIAS: (classes,)}
        check_shapes(state, self._shapes)
        self._state = state

    @classmethod
    def load(cls, settings: ModelPlan, head_file: Path, state_file: Path) -> LinearModel | None:
        """Read the server's files; None: the head file does not describe its architecture.

        Raises:
            MalformedFrame: a file is damaged, or the head is of another model than the run's.
        """
        try:
            file = ArrayFile(head_file)
            stored, images = head_plan(read_plan(file)), read_preparation(file)
            architecture = read_architecture(file)
        except UNUSABLE as error:
            raise unusable(head_file, error) from error
        if stored != head_plan(settings):
            raise MalformedFrame(
                "the head file is of another model than the run's",
                field="head",
                limit=str(head_plan(settings)),
                value=str(stored),
            )
        if architecture is None:
            return None
        try:
            head = NumpyHead(architecture, Weights(file), settings.cut)
        except (*UNUSABLE, KeyError, ValueError) as error:
            raise unusable(head_file, error) from error
        try:
            state = load_state(state_file)
            return cls(settings, head, preprocessing_of(settings, images), state)
        except UNUSABLE as error:
            raise unusable(state_file, error) from error

    def smashed(self, images: Floats) -> Floats:
        return self._head(images)

    def for_tail(self, smashed: Floats) -> Floats:
        return smashed

    def classify(self, inferred: Floats) -> Floats:
        return inferred  # the server has the tail

    @property
    def classifier(self) -> tuple[Floats, Floats]:
        return self._state[_WEIGHT], self._state[_BIAS]

    def set_classifier(self, weight: NDArray[np.floating], bias: NDArray[np.floating]) -> None:
        self._state = {
            _WEIGHT: weight.astype(np.float32),
            _BIAS: bias.astype(np.float32),
        }

    def load_global_state(self, state_file: Path) -> None:
        try:
            state = load_state(state_file)
            check_shapes(state, self._shapes)
        except (*UNUSABLE, TensorFileError) as error:
            raise unusable(state_file, error) from error
        self._state = state

    def state(self) -> State:
        return {name: array.copy() for name, array in self._state.items()}

    def feature_shape(self, pooled: bool) -> tuple[int, int]:
        numbers = _numbers_read(self.settings, self._head.architecture)
        return 1, min(self.settings.rank, numbers) if self.settings.rank else numbers


def _numbers_read(settings: ModelPlan, architecture: Architecture) -> int:
    """Return the number of features of a sample, before they are projected on the basis.

    After each block that is read these are the class token, if there is one, and mean and spread of
    the image tokens.
    """
    body = architecture.depth - settings.tail_blocks - settings.cut
    each = 3 if architecture.prefix_tokens else 2
    return min(settings.depths, body) * each * architecture.width
