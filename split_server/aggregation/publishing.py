"""Publish an average as the global state, and as a change for the devices."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from protocol.codec_names import is_row_wise_inside
from protocol.errors import InvalidField
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.plan import RunPlan
from split_model.checkpoints.state import applied, difference, is_server_side
from split_model.files import write_durably
from split_server.storage.run_files import RunFiles, StateRefs

log = logging.getLogger(__name__)


def publish(
    average: Mapping[str, Tensor], base: StateRefs, settings: RunPlan, files: RunFiles
) -> StateRefs:
    """Write a new global state to disk; with ``wire.update_deltas``, also its change.

    A lossy codec rounds the change, and the global state is the sum of the old state and the
    rounded change, so that devices and server have equal states. The server-side state is exact.

    Args:
        average: the round's average.
        base: the state before the round.
        settings: the run's plan.
        files: the run's files.
    """
    placement = settings.model.prompt_at
    if not settings.wire.update_deltas:
        return files.write_state(average, placement)
    server_state = {name: t for name, t in average.items() if is_server_side(name, placement)}
    old = files.read_state(StateRefs(base.device))
    change = difference({k: v for k, v in average.items() if k not in server_state}, old)
    codec = _codec_down(settings.wire.updates)
    tensors = {name: (tensor, codec) for name, tensor in change.items()}
    try:
        frame = join_frame(encode_frame("delta", {"base": base.device.sha256}, tensors))
    except InvalidField as error:  # out of the codec's range: devices download the whole state
        log.warning("a global state is published without its change: %s", error)
        return files.write_state(average, placement)
    new = applied(old, decode_frame(frame).tensors())
    new |= server_state
    refs = files.write_state(new, placement)
    files.drop_deltas()
    write_durably(files.delta(refs.device.sha256, base.device.sha256), bytes(frame))
    return refs


def _codec_down(updates: str) -> str:
    """Return the codec of changes sent to devices: that of updates, or float16 if that is sparse.

    A device adds the error of a sparse codec to its next update; the server does not.
    """
    return updates if is_row_wise_inside(updates) else "float16"
