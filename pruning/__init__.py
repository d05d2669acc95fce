"""Which samples are worth their traffic: a score for each, and the choice of the highest.

Phase 1 of SFPrompt (arXiv 2407.17533, section 3): a device scores its samples with the head and
the tail alone, and sends only the highest-scoring share through the split model.
"""

from pruning.scores import SCORES, Score, el2n, grand, loss, margin, random, random_draw
from pruning.selection import keep_highest, kept_count

__all__ = [
    "SCORES",
    "Score",
    "el2n",
    "grand",
    "keep_highest",
    "kept_count",
    "loss",
    "margin",
    "random",
    "random_draw",
]
