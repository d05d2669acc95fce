"""Join a run as the command line says: consent, data and identity."""

from __future__ import annotations

import contextlib

from edge_client.data.batches import Preprocessing
from edge_client.data.dataset import Dataset, by_content, limit_per_set
from edge_client.data.partition import Part
from edge_client.data.pictures import parse_colour
from edge_client.data.sources import load_dataset, parse_source
from edge_client.participant import JoinedRun, Participant
from edge_client.reporter import Reporter
from edge_client.storage.identity import Identity
from protocol.errors import Forbidden, IdempotencyKeyReused, InvalidField
from protocol.messages import RunView
from protocol.plan import ModelPlan


def check_consent(run: RunView, shares_labels: bool, upload_only: bool) -> None:
    """Refuse a run that shares labels unless the owner agreed, before images are read."""
    if run.plan.shares_labels and not shares_labels:
        raise InvalidField(
            "this run sends the labels of its devices to the server",
            field="--share-labels",
            hint="add --share-labels if the server may have your labels",
        )
    if upload_only and not run.plan.shares_labels:
        raise InvalidField(
            "this run needs its devices until it ends: their labels stay with them",
            field="--upload-only",
            limit="a run with labels = shared",
            value=run.plan.training.labels,
        )


def join_as(
    identity: Identity, participant: Participant, run: str, join_token: str | None
) -> JoinedRun:
    """Join with the stored identity; if the images have changed, leave and join as a new one."""
    try:
        joined = participant.join(run, identity.key, join_token)
    except IdempotencyKeyReused:
        if (earlier := identity.credential) is not None:
            participant.server.authenticate(earlier)
            with contextlib.suppress(Forbidden):  # it has already left
                participant.server.leave(run)
        identity.renew()
        joined = participant.join(run, identity.key, join_token)
    identity.remember(joined.credential)
    return joined


def load_run_data(
    source: str,
    run: RunView,
    part: str | None,
    partition: str,
    seed: int,
    held_out: float,
    limit_train: int | None,
    limit_test: int | None,
    shots: int | None,
    *,
    reporter: Reporter,
    cache_bytes: int,
) -> Dataset:
    """Load the device's part of the data, limited as requested, and report remarks.

    Args:
        source: the text after ``--data``.
        run: the run, with class names, background and image size.
        part: "K/N", the device's part of the data; None: all data.
        partition: text of the partition scheme.
        seed: seed of the partition, of the held-out images and of the limits.
        held_out: share of each class held out for testing, in (0, 1), if there are no test images.
        limit_train: maximum number of training images; None: no limit.
        limit_test: maximum number of test images; None: no limit.
        shots: exact number of training images of each class; None: not fixed.
        reporter: receives progress, and the events ``skipped`` and ``noticed``.
        cache_bytes: memory budget of the resized images, in bytes for each of train and test.

    Raises:
        DataError: the data or the options are faulty.
    """
    model = run.plan.model
    is_folder = parse_source(source).kind == "folder"
    data = load_dataset(
        source,
        held_out=held_out,
        seed=seed,
        class_names=run.settings.class_names,
        background=parse_colour(model.background),
        preprocessing=_expected_preprocessing(model) if is_folder and cache_bytes else None,
        cache_bytes=2 * cache_bytes,
        progress=lambda done, total: reporter.advance("reading", done, total),
    )
    for entry in data.skipped:
        reporter.event("skipped", path=entry.path, reason=entry.reason)
    for entry in data.noticed:
        reporter.event("noticed", path=entry.path, reason=entry.reason)
    data = limit_per_set(data, train=limit_train, test=limit_test, shots=shots, seed=seed)
    if part is not None:
        parsed = Part.parse(part)
        data = Dataset(
            parsed.take(data.train, partition, seed), parsed.take(data.test, "iid", seed)
        )
    return by_content(data)


def _expected_preprocessing(model: ModelPlan) -> Preprocessing:
    """Return a preprocessing that resizes as nearly every backbone's does.

    The head file with the actual one is downloaded later. If it resizes in another way, the images
    are decoded again.
    """
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    background = parse_colour(model.background)
    return Preprocessing(model.image_size, *plain, "bicubic", model.fit, background)
