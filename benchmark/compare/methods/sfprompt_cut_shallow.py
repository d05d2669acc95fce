"""SFPrompt with prompts ahead of the body alone."""

from __future__ import annotations

from benchmark.compare.methods.method import Method, changed
from protocol.settings import RunSettings


class SFPromptCutShallow(Method):
    """The default preset with one set of prompts, ahead of the first block of the body."""

    name = "sfprompt-cut-shallow"
    what = "the default preset with prompts ahead of the body's first block only"
    costed_as = "sfprompt"

    def settings(self, base: RunSettings) -> RunSettings:
        return changed(base, {"model": {"prompt_at": "cut", "prompt_depth": "shallow"}})
