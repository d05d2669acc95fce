"""How an average becomes the global state: as it is, or as what devices can make of a change."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from protocol.codec_names import is_row_wise_inside
from protocol.errors import InvalidField
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.plan import RunPlan
from split_model import applied, difference, is_server_side
from split_model.files import write_durably
from split_server.storage.run_files import RunFiles, StateRefs

log = logging.getLogger(__name__)


def publish(
    average: Mapping[str, Tensor], base: StateRefs, settings: RunPlan, files: RunFiles
) -> StateRefs:
    """Write a new global state to disk, and with ``wire.update_deltas`` the way to it.

    A lossy codec rounds the change that devices are sent. What it rounds to is then the global
    state, so that all ends hold the very same one. What stays on the server is exact.
    """
    placement = settings.model.prompt_at
    if not settings.wire.update_deltas:
        return files.write_state(average, placement)
    held = {name: average[name] for name in average if is_server_side(name, placement)}
    old = files.read_state(StateRefs(base.device))
    change = difference({k: v for k, v in average.items() if k not in held}, old)
    codec = _codec_down(settings.wire.updates)
    tensors = {name: (tensor, codec) for name, tensor in change.items()}
    try:
        frame = join_frame(encode_frame("delta", {"base": base.device.sha256}, tensors))
    except InvalidField as error:  # a change beyond the codec's range: devices take the file
        log.warning("a global state is published whole: %s", error)
        return files.write_state(average, placement)
    new = applied(old, decode_frame(frame).tensors())
    new |= held
    refs = files.write_state(new, placement)
    files.drop_deltas()
    write_durably(files.delta(refs.device.sha256, base.device.sha256), bytes(frame))
    return refs


def _codec_down(updates: str) -> str:
    """The codec of changes to devices: that of updates, unless it leaves most of a tensor out.

    A device adds what was left out of one update to its next. Nobody does so on the way down.
    """
    return updates if is_row_wise_inside(updates) else "float16"
