"""Run random settings, and compare each run's end with its start and with the majority class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_client.data.dataset import Dataset
from protocol.errors import SFPromptError
from protocol.messages import parse_message
from protocol.settings import RunSettings
from sfprompt_bench.random_runs.draws import Draw, data_of
from sfprompt_bench.random_runs.node import Node

MODEL = {"backbone": "vit_small_patch14_dinov2", "weights": "packaged"}

_NOISE = 2.0  # standard errors of an accuracy


@dataclass(frozen=True)
class RandomRun:
    """A run's settings and accuracies.

    Attributes:
        drawn: its settings.
        start: accuracy after round 0.
        end: of the state that the run has at its end.
        majority: accuracy of always naming the most frequent class of the training labels.
        error: why the run failed; None: it did not.
    """

    drawn: Draw
    start: float = math.nan
    end: float = math.nan
    majority: float = math.nan
    error: str | None = None

    @property
    def noise(self) -> float:
        """Two standard errors of the accuracy after round 0, for these test images."""
        share = min(max(self.start, 1 / self.drawn.test_images), 1 - 1 / self.drawn.test_images)
        return _NOISE * math.sqrt(share * (1 - share) / self.drawn.test_images)

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong with this run; empty: nothing."""
        if self.error is not None:
            return (f"failed: {self.error}",)
        found = []
        if self.end < self.start - self.noise:
            found.append(f"ends {100 * (self.start - self.end):.1f} points below round 0")
        if self.end < self.majority - self.noise:
            found.append(f"ends {100 * (self.majority - self.end):.1f} points below the majority")
        return tuple(found)


def perform(node: Node, drawn: Draw, model: Mapping[str, Any] = MODEL) -> RandomRun:
    """Run the default form with these settings; a failure is a finding."""
    data = data_of(drawn)
    try:
        results = node.run(settings_of(drawn, data, model), data)
    except SFPromptError as error:
        return RandomRun(drawn, error=str(error))
    start = next((view.accuracy for view in results.rounds if view.accuracy is not None), None)
    end = results.best.accuracy if results.best else None
    if start is None or end is None:
        return RandomRun(drawn, error="no round was evaluated")
    return RandomRun(drawn, start, end, majority_accuracy(data))


def settings_of(drawn: Draw, data: Sequence[Dataset], model: Mapping[str, Any]) -> RunSettings:
    """The default form with the drawn classes, image size and rounds; nothing else is set."""
    return parse_message(
        RunSettings,
        {
            "name": f"random-{drawn.number}",
            "seed": drawn.number,
            "class_names": data[0].class_names,
            "model": {**model, "image_size": drawn.image_size, "num_classes": drawn.classes},
            "federation": {
                "rounds": drawn.rounds,
                "min_participants": drawn.devices,
            },
        },
    )


def majority_accuracy(data: Sequence[Dataset]) -> float:
    """The share of test images in the class with the most training images."""
    totals = np.sum([part.train.class_counts() for part in data], axis=0)
    test = data[0].test
    return int(test.class_counts()[totals.argmax()]) / len(test)
