"""Measure the global state on the device's held-out samples, through the server's body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from edge_client.data import BatchReader
from edge_client.device_model import DeviceModel
from edge_client.transport import Server

_BATCH = 128


@dataclass(frozen=True)
class Evaluation:
    """Counts over the held-out samples; sums, so that participants' can be added."""

    samples: int
    correct: int
    loss_sum: float


@torch.no_grad()
def evaluate(
    model: DeviceModel,
    server: Server,
    samples: BatchReader,
    *,
    round_: int,
    codec: str,
    advance: Callable[[str, int, int], None],
) -> Evaluation:
    """Classify every sample with head → body → tail and count."""
    correct, loss_sum = 0, 0.0
    chunks = torch.arange(len(samples)).split(_BATCH) if len(samples) else ()
    for done, positions in enumerate(chunks, start=1):
        images, labels = samples.read(positions)
        smashed = model.head(images, model.prompts)
        step = f"evaluate.{round_}.{done}"
        logits = model.tail(server.infer(smashed, step=step, round_=round_, codec=codec))
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        advance("evaluate", done, len(chunks))
    return Evaluation(len(samples), correct, loss_sum)
