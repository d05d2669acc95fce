"""Split-federated full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.splitfed import SplitFed


class SplitFedFull(SplitFed):
    """Nothing is frozen.

    Each participant has a body of its own on the server during a round; at its end the bodies are
    averaged as heads and tails are.
    """

    name = "splitfed-full"
    what = "U-shaped SplitFed: head, body and tail are trained, all are averaged, float32"
    costed_as = "splitfed-full"
    # As full fine-tuning.
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 5e-5}}
    tuned: ClassVar[Mapping[str, Any]] = {"tune": "full", "tune_body": True}
