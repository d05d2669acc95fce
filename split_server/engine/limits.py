"""The engine's limits, importable without torch: the server's settings use them too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackwardMode = Literal["auto", "retained", "recompute"]


@dataclass(frozen=True)
class EngineLimits:
    """Limits of the engine's memory and waiting times, and how it forms batches.

    Attributes:
        retained_bytes: memory for what steps retain between forward and backward, and for sessions.
        queued_bytes: memory for the tensors of queued tasks.
        response_bytes: memory for responses cached for repeated requests.
        step_timeout_s: a step without its backward is dropped after this time, and so is a session
            without a request.
        steps_per_participant: open steps of one participant; a new step replaces the oldest.
        max_batch_samples: samples computed together; None: as many as the device gains from.
        max_wait_s: longest wait of a forward for other forwards while the device is idle.
        backward: ``retained``: a step retains its autograd graph; ``recompute``: it retains its
            input alone and its forward runs twice; ``auto``: the graph while memory lasts.
        graph_timeout_s: a step without its backward retains its input alone after this time.
    """

    retained_bytes: int
    queued_bytes: int
    response_bytes: int
    step_timeout_s: float = 300.0
    steps_per_participant: int = 4
    max_batch_samples: int | None = None
    max_wait_s: float = 0.002
    backward: BackwardMode = "auto"
    graph_timeout_s: float = 30.0
