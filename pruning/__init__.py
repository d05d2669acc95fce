"""Which samples are worth their traffic: a score for each, and the choice of the highest.

Phase 1 of SFPrompt (arXiv 2407.17533, section 3): a device scores its samples with the head and
the tail alone, and sends only the highest-scoring share through the split model.
"""

from pruning.scores import SCORES, Score, draw_random_scores, el2n, grand, loss, margin, random
from pruning.selection import select_highest, selected_count

__all__ = [
    "SCORES",
    "Score",
    "draw_random_scores",
    "el2n",
    "grand",
    "loss",
    "margin",
    "random",
    "select_highest",
    "selected_count",
]
