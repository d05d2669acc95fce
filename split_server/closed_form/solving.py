"""Fit the classifier of round 0 to the sums that agree, and store what each sender has sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from split_server.closed_form.agreement import ClassMeans, Whitening
from split_server.closed_form.classifier import FeatureSums, fit_classifier
from split_server.closed_form.known import KnownSamples, read_known, write_known
from split_server.closed_form.result import Fitted, Solved, decode_all, sum_features, write_solved
from split_server.closed_form.sample_features import SampleFeatures
from split_server.closed_form.sums import Sums
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.run_files import RunFiles

log = logging.getLogger(__name__)

Sender = tuple[str, SampleFeatures, Sums]  # participant, its samples, its sums


def solve_start(
    files: RunFiles, run: RunSnapshot, attempt: int, fitted: Fitted, senders: Sequence[Sender]
) -> Solved:
    """Fit the classifier of an attempt at round 0; the result is durable on return.

    Args:
        files: of the run.
        run: the run.
        attempt: at round 0.
        fitted: basis and sums of all features.
        senders: the participants that have sent sums, in the run's order.
    """
    codec = run.plan.wire.start
    left_out = find_left_out(fitted.sums, [sums for _, _, sums in senders], run)
    counted = [each for position, each in enumerate(senders) if position not in left_out]
    sums, used = fitted.sums, sum(int(each.counts.sum()) for _, _, each in counted)
    if used < sums.count:  # without the samples whose labels do not count
        sums = sum_features(fitted.basis, [features for _, features, _ in counted], codec)
    class_sums = torch.stack([each.features.double() for _, _, each in counted]).sum(dim=0)
    counts = torch.stack([each.counts.double() for _, _, each in counted]).sum(dim=0)
    classifier = fit_classifier(sums, class_sums, counts, fitted.basis.scale)
    for position, share in left_out.items():
        participant, features, own = senders[position]
        decoded = decode_all(fitted.basis, features, codec)
        write_known(files.known(attempt, participant), KnownSamples(decoded, own, share))
        log.warning("run %s: the labels of %s disagree with the others'", run.id, participant)
    solved = Solved(fitted.basis, classifier, fitted.sums.mean, fitted.sums.variances)
    write_solved(files.basis(attempt), solved)
    return solved


def find_left_out(sums: FeatureSums, senders: Sequence[Sums], run: RunSnapshot) -> dict[int, float]:
    """Return the share of agreeing samples of each sender whose labels disagree, by position."""
    required = run.plan.federation.label_agreement
    if not required or not senders:
        return {}
    return ClassMeans(Whitening.of(sums), senders).find_disagreeing(required)


def add_participant(
    files: RunFiles,
    run: RunSnapshot,
    attempt: int,
    solved: Solved,
    participant: str,
    known: KnownSamples,
) -> None:
    """Store the features and sums of a participant whose sums arrived after the fit.

    Its labels are compared with those of all others that count.

    Args:
        files: of the run.
        run: the run.
        attempt: at round 0.
        solved: its result.
        participant: its id.
        known: its features and sums.
    """
    if known.sums is None:
        raise ValueError("a participant is added with its sums")
    required, low = run.plan.federation.label_agreement, None
    if required:
        whitening = Whitening.of_solved(solved.classifier, known.features)
        senders = [known.sums, *_counted_sums(files, run, attempt, participant)]
        share = ClassMeans(whitening, senders).share(0)
        low = share[0] if share is not None and share[0] < required else None
    write_known(files.known(attempt, participant), replace(known, disagrees=low))


def _counted_sums(files: RunFiles, run: RunSnapshot, attempt: int, but: str) -> list[Sums]:
    """Return the sums of the other participants whose labels count."""
    others = (read_known(files.known(attempt, each)) for each in run.participants if each != but)
    return [each.sums for each in others if each and each.sums and each.disagrees is None]
