"""Tuning on one heap of data, in the paper's form."""

from __future__ import annotations

from benchmark.compare.methods.central import Central


class CentralPaper(Central):
    """The prompts and tail of `sfprompt-paper`, tuned in one process that has all the data."""

    name = "central-paper"
    what = "the prompts and tail of sfprompt-paper, tuned on one heap of data"
    form = "paper"
