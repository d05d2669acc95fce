"""Split-federated learning without prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from benchmark.compare.methods.method import Changes, Method, changed
from protocol.forms import Form
from protocol.settings import RunSettings, WireSettings


class SplitFed(Method):
    """SplitFed (arXiv 2004.12088) in U-shape, in float32.

    The paper's form of SFPrompt with no prompts, all samples and no local update.

    Attributes:
        tuned: what of the model is tuned, as settings of the model.
    """

    form: ClassVar[Form] = "paper"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8}}
    tuned: ClassVar[Mapping[str, Any]]

    def settings(self, base: RunSettings) -> RunSettings:
        unprompted = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        return changed(
            base,
            {
                "model": {**unprompted, **self.tuned},
                "training": {"keep_fraction": 1.0, "pruning": "random", "local_epochs": 0},
                "wire": WireSettings().model_dump(),
            },
        )
