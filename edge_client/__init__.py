"""The edge client: the device's data, a round's training phases, and requests to the server.

The public names are imported on first use, because most of them import torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.data import Dataset, load_dataset
    from edge_client.method import DeviceMethod, RoundResult
    from edge_client.model import DeviceModel
    from edge_client.participant import JoinedRun, Participant
    from edge_client.prediction import Predictor, WholePredictor
    from edge_client.transport import Link, RetryPolicy, Server, SplitPlane

__all__ = [
    "Dataset",
    "DeviceMethod",
    "DeviceModel",
    "JoinedRun",
    "Link",
    "Participant",
    "Predictor",
    "RetryPolicy",
    "RoundResult",
    "Server",
    "SplitPlane",
    "WholePredictor",
    "load_dataset",
]

try:
    __version__ = metadata.version("sfprompt")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

_MODULES = {
    "Dataset": "edge_client.data",
    "DeviceMethod": "edge_client.method",
    "DeviceModel": "edge_client.model",
    "JoinedRun": "edge_client.participant",
    "Link": "edge_client.transport",
    "Participant": "edge_client.participant",
    "Predictor": "edge_client.prediction",
    "RetryPolicy": "edge_client.transport",
    "RoundResult": "edge_client.method",
    "Server": "edge_client.transport",
    "SplitPlane": "edge_client.transport",
    "WholePredictor": "edge_client.prediction",
    "load_dataset": "edge_client.data",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
