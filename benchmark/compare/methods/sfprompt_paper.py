"""SFPrompt as its paper has it."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Method, changed
from protocol.forms import Form
from protocol.settings import RunSettings, WireSettings


class SFPromptPaper(Method):
    """SFPrompt (arXiv 2407.17533, section 3): prompts at the input, everything in float32."""

    name = "sfprompt-paper"
    what = "SFPrompt as published: prompts at the input, four tensors a step, float32"
    form: ClassVar[Form] = "paper"
    costed_as = "sfprompt-paper"

    def settings(self, base: RunSettings) -> RunSettings:
        plain = WireSettings().model_dump()
        return changed(
            base, {"model": {"prompt_at": "input", "prompt_depth": "shallow"}, "wire": plain}
        )
