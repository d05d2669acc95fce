"""SFPrompt as this project runs it."""

from __future__ import annotations

from benchmark.compare.methods.method import Method, changed
from protocol.settings import RunSettings


class SFPrompt(Method):
    """Prompts ahead of every block of the body, kept and tuned by the server."""

    name = "sfprompt"
    what = "SFPrompt, default preset: prompts in every block of the body, kept by the server"
    costed_as = "sfprompt"

    def settings(self, base: RunSettings) -> RunSettings:
        return changed(base, {"model": {"prompt_at": "cut", "prompt_depth": "deep"}})
