"""Split-federated tuning of a linear tail."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Method, changed
from protocol.forms import Form
from protocol.settings import RunSettings, WireSettings


class SplitFedLinear(Method):
    """SplitFed (arXiv 2004.12088) in U-shape with a frozen head and body, in float32.

    The paper's form of SFPrompt with no prompts, all samples and no local update.
    """

    name = "splitfed-linear"
    what = "U-shaped SplitFed with frozen head and body: the tail alone is tuned, float32"
    form: ClassVar[Form] = "paper"
    costed_as = "splitfed-linear"

    def settings(self, base: RunSettings) -> RunSettings:
        return changed(
            base,
            {
                "model": {
                    "prompt_at": "input",
                    "prompt_depth": "shallow",
                    "prompt_count": 0,
                    "tune": "classifier",
                },
                "training": {"keep_fraction": 1.0, "pruning": "random", "local_epochs": 0},
                "wire": WireSettings().model_dump(),
            },
        )
