"""SFPrompt as its paper has it, with a small body on the device for the local update."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.sfprompt_paper import SFPromptPaper


class SFPromptPaperProxy(SFPromptPaper):
    """The paper's form, local updates through two blocks that are distilled from the body's."""

    name = "sfprompt-paper-proxy"
    what = "SFPrompt as published, local updates through a small body that the server distils"
    recipe: ClassVar[Changes] = {"model": {"local_body": 2}, "distillation": {"epochs": 5}}
