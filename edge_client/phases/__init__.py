"""The phases of a round on the device, in the order in which they run."""

from edge_client.phases.context import Diverged, RoundContext, Samples
from edge_client.phases.evaluation import Evaluation, evaluate
from edge_client.phases.local_update import local_update
from edge_client.phases.neurons import inactive_neurons
from edge_client.phases.proximal import Proximal
from edge_client.phases.scoring import keep_samples
from edge_client.phases.split_training import Trained, split_train

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
