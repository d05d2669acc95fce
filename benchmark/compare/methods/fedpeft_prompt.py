"""FedPEFT with prompts."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.whole_model import WholeModel
from split_model import Anatomy

_PROMPTS = 10  # ahead of each block, whatever the run's own prompts are


class FedPeftPrompt(WholeModel):
    """FedPEFT-Prompt (arXiv 2210.01708): VPT-Deep (arXiv 2203.12119), and the classifier."""

    name = "fedpeft-prompt"
    what = "FedPEFT: ten prompts ahead of every block, and the classifier"
    costed_as = "fedpeft-prompt"
    recipe: ClassVar[Changes] = {
        "training": {
            "batch_size": 8,
            "prompt_learning_rate": 2e-3,
            "tail_learning_rate": 1e-2,
        }
    }
    tuned = "classifier"

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        return {"prompt_depth": "deep", "prompt_count": _PROMPTS}
