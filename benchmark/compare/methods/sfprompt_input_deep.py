"""SFPrompt with prompts in every block from the input on."""

from __future__ import annotations

from benchmark.compare.methods.method import changed
from benchmark.compare.methods.sfprompt_input_shallow import SFPromptInputShallow
from protocol.settings import RunSettings


class SFPromptInputDeep(SFPromptInputShallow):
    """Refused, by the name of the setting, wherever a cut backbone has no deep prompts there."""

    name = "sfprompt-input-deep"
    what = "the same with prompts ahead of every block that the device holds"
    costed_as = None

    def settings(self, base: RunSettings) -> RunSettings:
        return changed(base, {"model": {"prompt_at": "input", "prompt_depth": "deep"}})
