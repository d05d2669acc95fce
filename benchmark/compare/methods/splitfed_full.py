"""Split-federated full fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes, Method, changed
from protocol.forms import Form
from protocol.settings import RunSettings, WireSettings


class SplitFedFull(Method):
    """SplitFed (arXiv 2004.12088) in U-shape, in float32: nothing is frozen.

    Each participant has a body of its own on the server during a round; at its end the bodies are
    averaged as heads and tails are.
    """

    name = "splitfed-full"
    what = "U-shaped SplitFed: head, body and tail are trained, all are averaged, float32"
    form: ClassVar[Form] = "paper"
    costed_as = "splitfed-full"
    # As full fine-tuning.
    recipe: ClassVar[Changes] = {"training": {"tail_learning_rate": 5e-5, "warmup_rounds": 1}}

    def settings(self, base: RunSettings) -> RunSettings:
        return changed(
            base,
            {
                "model": {
                    "prompt_at": "input",
                    "prompt_depth": "shallow",
                    "prompt_count": 0,
                    "tune": "full",
                    "tune_body": True,
                },
                "training": {"keep_fraction": 1.0, "pruning": "random", "local_epochs": 0},
                "wire": WireSettings().model_dump(),
            },
        )
