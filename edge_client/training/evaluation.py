"""Measure the global state on the device's held-out samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_client.data.image_set import Labels
from edge_client.model import Floats, Model
from edge_client.training.context import Advance, Samples
from edge_client.transport.split_client import Ids, SplitPlane
from protocol.quality import PredictionCounts
from split_model.predictions import PredictionCounter, cross_entropy, softmax

Item = TypeVar("Item")

Value = TypeVar("Value")

_BATCH = 128


@dataclass(frozen=True)
class Evaluation:
    """Sums over the held-out samples, which the server adds over participants."""

    samples: int
    correct: int
    loss_sum: float
    predictions: PredictionCounts | None = None


def evaluate(
    model: Model,
    plane: SplitPlane,
    samples: Samples,
    *,
    step: str,
    round_: int,
    advance: Advance,
    state: str | None = None,
    counter: PredictionCounter | None = None,
) -> Evaluation:
    """Classify every sample with head → body → tail, and sum correct predictions and losses.

    The head computes a batch while the server computes the one before. A device with the whole
    model sends no request.

    Args:
        model: the device's model.
        plane: the split plane of the run.
        samples: of one set.
        step: prefix of the requests' names.
        round_: that produced the state.
        advance: called with the phase, the finished batches and all batches.
        state: hash of the only state to compute with; None: the server's newest.
        counter: counts the predictions by class and confidence; None: they are not counted.

    Raises:
        StaleRound: the server's global state is no longer ``state``.
    """
    correct, loss_sum = 0, 0.0
    positions = np.arange(len(samples))
    if samples.uploader is not None:
        samples.uploader.ensure(positions)
    size = model.samples_per_frame(_BATCH)
    batches = [positions[start : start + size] for start in range(0, len(samples), size)]

    def compute_smashed(batch: Labels) -> Floats | None:
        if samples.outputs is not None:
            return None
        return model.smashed(samples.images.read(batch)[0])

    for done, (batch, smashed) in enumerate(prefetch(batches, compute_smashed), start=1):
        name = f"{step}.{done}"

        def request(sent: Floats | Ids, name: str = name) -> Floats:
            return plane.infer(sent, step=name, round_=round_, state=state)

        if smashed is None:
            features = samples.request_with_batch(batch, None, request)
        else:
            features = smashed if model.is_whole else request(smashed)
        logits, labels = model.classify(features), samples.images.image_set.labels[batch]
        correct += int((logits.argmax(axis=1) == labels).sum())
        loss_sum += cross_entropy(logits, labels) * len(labels)
        if counter is not None:
            counter.add(softmax(logits), labels)
        advance("evaluate", done, len(batches))
    predictions = None if counter is None else counter.counts()
    return Evaluation(len(samples), correct, loss_sum, predictions)


def prefetch(
    items: Iterable[Item], compute: Callable[[Item], Value]
) -> Iterator[tuple[Item, Value]]:
    """Yield each item with its computed value; a thread computes one item ahead.

    An exception of ``compute`` is raised at its item's turn.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        waiting: deque[tuple[Item, Future[Value]]] = deque()
        for item in items:
            waiting.append((item, thread.submit(compute, item)))
            if len(waiting) > 1:
                first, value = waiting.popleft()
                yield first, value.result()
        for item, value in waiting:
            yield item, value.result()
