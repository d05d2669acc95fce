"""SFPrompt with prompts at the input, lean on the wire."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes, Method, changed
from protocol.forms import Form
from protocol.settings import RunSettings


class SFPromptInputShallow(Method):
    """The paper's placement and recipe, with the codecs of the default preset where they apply."""

    name = "sfprompt-input-shallow"
    what = "the paper's placement and recipe in 8 bits, features only as far as the tail reads"
    form: ClassVar[Form] = "paper"
    recipe: ClassVar[Changes] = {
        "wire": {
            "smashed": "int8",
            "features": "int8",
            "gradients": "int8",
            "inference": "float16",
            "updates": "float16",
            "update_deltas": True,
            "head": "int8",
            "pooled_features": True,
        }
    }
    costed_as: ClassVar[str | None] = "sfprompt"

    def settings(self, base: RunSettings) -> RunSettings:
        return changed(base, {"model": {"prompt_at": "input", "prompt_depth": "shallow"}})
