"""Join a run as the device that the command line names, with its owner's consent."""

from __future__ import annotations

import contextlib

from edge_client.participant import JoinedRun, Participant
from edge_client.storage.identity import Identity
from protocol.errors import Forbidden, IdempotencyKeyReused, InvalidField
from protocol.messages import RunView


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
