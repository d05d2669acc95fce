"""The handlers of round 0 (ids for features, sums for a classifier) and of shared labels."""

from __future__ import annotations

import torch

from split_server.closed_form.sums import Sums
from split_server.http.handlers import HandlerContext, Reply, Submit, missing_reply
from split_server.payloads.labels import parse_labels
from split_server.payloads.requests import SplitRequest
from split_server.payloads.start import parse_solve, parse_start


def handle_start(context: HandlerContext, request: SplitRequest) -> Submit:
    """Reply with the features of the named samples, once all participants have named theirs."""
    start = parse_start(request)
    starts, codec = context.services.starts, request.plan.wire.start
    run, sender, meta = request.run, request.participant, start.meta

    async def reply() -> Reply:
        if start.is_later:
            features = await starts.later.features(run, sender, start.ids)
        else:
            features = await starts.features(run, sender, meta.attempt, start.ids)
        if isinstance(features, list):
            return missing_reply(features)
        tensors = {
            "features": (features.values, codec),
            "mean": (features.mean.float(), "float32"),
            "variances": (features.variances.float(), "float32"),
            "strength": (torch.tensor([features.strength]), "float32"),
        }
        return Reply("start", meta.model_dump(), tensors)

    return reply


def handle_solve(context: HandlerContext, request: SplitRequest) -> Submit:
    """Reply with the classifier, once all participants have sent their sums.

    Once round 0 has its result, it replies at once.
    """
    solve, starts = parse_solve(request), context.services.starts
    sums, run, sender = Sums(solve.sums, solve.counts), request.run, request.participant

    async def reply() -> Reply:
        if solve.is_later:
            classifier, leverage = await starts.later.classifier(run, sender, sums)
        else:
            attempt = solve.meta.attempt
            classifier, leverage = await starts.classifier(run, sender, attempt, sums)
        tensors = {
            "weight": (classifier.weight, "float32"),
            "bias": (classifier.bias, "float32"),
            "leverage": (leverage, "float32"),
            "strength": (torch.tensor([classifier.strength / max(1, classifier.count)]), "float32"),
        }
        return Reply("solve", solve.meta.model_dump(), tensors)

    return reply


def handle_labels(context: HandlerContext, request: SplitRequest) -> Reply:
    """Keep a participant's labels, or name the samples that have to be sent first."""
    labels = parse_labels(request)
    missing = context.services.labels.receive(request.run, request.participant, labels)
    return missing_reply(missing) if missing else Reply("kept")
