"""How an average becomes the global state: as it is, or as what devices can make of a change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.settings import RunSettings
from split_model import applied, difference
from split_server.states import PROMPTS, RunFiles, StateRefs, write_durably


def publish(
    average: Mapping[str, Tensor], base: StateRefs, settings: RunSettings, files: RunFiles
) -> StateRefs:
    """Write a new global state to disk, and with ``wire.update_deltas`` the way to it.

    A lossy codec rounds the change that devices are sent. What it rounds to is then the global
    state, so that all ends hold the very same one. Prompts that stay on the server are exact.
    """
    placement = settings.model.prompt_at
    if not settings.wire.update_deltas:
        return files.write_state(average, placement)
    held = {PROMPTS} if placement == "cut" else set()
    old = files.read_state(StateRefs(base.device))
    change = difference({k: v for k, v in average.items() if k not in held}, old)
    frame = join_frame(
        encode_frame(
            "delta",
            {"base": base.device.sha256},
            {name: (tensor, settings.wire.updates) for name, tensor in change.items()},
        )
    )
    new = applied(old, decode_frame(frame).tensors())
    new |= {name: average[name] for name in held if name in average}
    refs = files.write_state(new, placement)
    write_durably(files.delta(refs.device.sha256, base.device.sha256), bytes(frame))
    return refs
