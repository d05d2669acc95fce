"""The phases of a round on the device, in the order in which they run."""

from edge_client.training.context import Diverged, Proximal, RoundContext, Samples
from edge_client.training.evaluation import Evaluation, evaluate
from edge_client.training.local_update import local_update
from edge_client.training.selection import inactive_neurons, keep_samples
from edge_client.training.split_training import Trained, split_train

__all__ = [
    "Diverged",
    "Evaluation",
    "Proximal",
    "RoundContext",
    "Samples",
    "Trained",
    "evaluate",
    "inactive_neurons",
    "keep_samples",
    "local_update",
    "split_train",
]
