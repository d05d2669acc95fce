"""The phases of a round on the device, in the order in which they run."""

from edge_client.training.closed_form import classifier_loss, fit_start, tune_classifier
from edge_client.training.context import Diverged, Proximal, RoundContext, Samples
from edge_client.training.evaluation import Evaluation, evaluate
from edge_client.training.local_update import local_update
from edge_client.training.selection import select_samples
from edge_client.training.split_training import TrainingResult, split_train

__all__ = [
    "Diverged",
    "Evaluation",
    "Proximal",
    "RoundContext",
    "Samples",
    "TrainingResult",
    "classifier_loss",
    "evaluate",
    "fit_start",
    "local_update",
    "select_samples",
    "split_train",
    "tune_classifier",
]
