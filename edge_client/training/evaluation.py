"""Measure the global state on the device's held-out samples, through the body, if there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.model import DeviceModel
from edge_client.training.context import Advance, Samples
from edge_client.transport import SplitPlane
from edge_client.transport.split_client import max_samples_per_frame

Item = TypeVar("Item")

Made = TypeVar("Made")


def prefetch(items: Iterable[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """Each item with what ``make`` makes of it, on a thread, one item ahead of whoever takes them.

    What ``make`` raises comes at its item's turn.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        for item in items:
            waiting.append((item, thread.submit(make, item)))
            if len(waiting) > 1:
                first, made = waiting.popleft()
                yield first, made.result()
        for item, made in waiting:
            yield item, made.result()


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
    plane: SplitPlane,
    samples: Samples,
    *,
    round_: int,
    advance: Advance,
    state: str | None = None,
) -> Evaluation:
    """Classify every sample with head → body → tail and count.

    The head runs on the next batch while one is with the server.
    A device that holds the whole model asks nobody.

    Raises:
        StaleRound: the server holds another global state than ``state`` by now.
    """
    correct, loss_sum = 0, 0.0
    everything = torch.arange(len(samples))
    if samples.kept is not None:
        samples.kept.ensure(everything)
    chunks = everything.split(max_samples_per_frame(model.head, _BATCH)) if len(samples) else ()

    def smashed_of(positions: Tensor) -> Tensor | None:
        if samples.outputs is not None:
            return None
        with torch.no_grad():  # which holds for a thread, and this is another
            smashed: Tensor = model.head(samples.images.read(positions)[0], model.prompts)
            return smashed

    for done, (positions, smashed) in enumerate(prefetch(chunks, smashed_of), start=1):
        step = f"evaluate.{round_}.{done}"

        def request(batch: Tensor, step: str = step) -> Tensor:
            return plane.infer(batch, step=step, round_=round_, state=state)

        if smashed is None:
            features = samples.with_batch(positions, None, request)
        else:
            features = smashed if model.is_whole else request(smashed)
        logits, labels = model.tail(features), samples.images.image_set.labels[positions]
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        advance("evaluate", done, len(chunks))
    return Evaluation(len(samples), correct, loss_sum)
