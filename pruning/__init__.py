"""Phase 1 of SFPrompt: scores of samples, and the selection of the samples for split training.

A device scores its samples with head and tail alone, and trains through the server only on the
samples with the highest scores.

Source: arXiv 2407.17533, section 3.
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
