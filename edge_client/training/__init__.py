"""The phases of a round on the device. Those that compute gradients need torch.

Their modules are `selection`, `local_update`, `split_training` and `proximal`.
"""

from edge_client.training.closed_form import classifier_loss, fit_start, tune_classifier
from edge_client.training.context import Diverged, RoundContext, Samples
from edge_client.training.evaluation import Evaluation, evaluate

__all__ = [
    "Diverged",
    "Evaluation",
    "RoundContext",
    "Samples",
    "classifier_loss",
    "evaluate",
    "fit_start",
    "tune_classifier",
]
