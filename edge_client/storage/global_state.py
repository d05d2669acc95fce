"""The global states as they come to a device, and its own as it goes back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy as copy
from pathlib import Path

from torch import Tensor

from edge_client.storage.blob_cache import BlobCache
from edge_client.transport import Server
from protocol.codecs.feedback import ErrorFeedback
from protocol.codecs.registry import as_decoded
from protocol.errors import MalformedFrame, NotFound
from protocol.frames import require_kind
from protocol.messages import BlobRef, UpdateMeta
from protocol.plan import WirePlan
from split_model import TunedState, applied, difference, load_state, state_bytes


class GlobalStates:
    """Downloads the states of one run and sends updates to them.

    With ``wire.update_deltas`` both cross as changes against a state that both ends hold. What a
    codec leaves out of an update is added to the next one.

    Args:
        server: authenticated.
        run: its id.
        wire: the run's settings.
        files: keeps what was downloaded.
    """

    def __init__(self, server: Server, run: str, wire: WirePlan, files: BlobCache) -> None:
        self._server = server
        self._run = run
        self._wire = wire
        self._files = files
        self._feedback = ErrorFeedback()
        self._feedback_before = ErrorFeedback()
        self._sent_against: str | None = None
        self._held: tuple[BlobRef, TunedState] | None = None

    def fetch(self, ref: BlobRef) -> Path:
        """The file of a state; nothing is downloaded that is here already."""
        made: bytes | None = None

        def download(start: int) -> bytes | bytearray | memoryview:
            nonlocal made
            if made is None:
                made = self._from_delta(ref) or b""
            return made[start:] if made else self._server.state(self._run, ref, start)

        try:
            path = self._files.fetch(ref, download)
        except MalformedFrame:
            if not made:
                raise
            # What this device makes of a change is not what the server made of it.
            path = self._files.fetch(ref, lambda start: self._server.state(self._run, ref, start))
        if self._wire.update_deltas:
            self._held = (ref, load_state(path))
        return path

    def send(
        self,
        meta: UpdateMeta,
        state: Mapping[str, Tensor],
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Send an update of the state that was fetched last, and other tensors beside it.

        Raises:
            StaleRound: its round is over.
            StepLost: the server has lost its part of the update.
        """
        codec = self._wire.updates
        if not self._wire.update_deltas or self._held is None:
            self._server.send_update(self._run, meta, state, codec, beside)
            return
        base, old = self._held
        if base.sha256 == self._sent_against:  # the round is repeated: its first update is void
            self._feedback = copy(self._feedback_before)
        self._feedback_before = copy(self._feedback)
        corrected = {
            name: self._feedback.add_residual(name, change)
            for name, change in difference(state, old).items()
        }
        based = meta.model_copy(update={"base": base.sha256})
        self._server.send_update(self._run, based, corrected, codec, beside)
        for name, value in corrected.items():
            self._feedback.store_residual(name, value, as_decoded(value, codec))
        self._sent_against = base.sha256

    def _from_delta(self, ref: BlobRef) -> bytes | None:
        """The state's file, made from the one that is here; None: it has to come whole."""
        if self._held is None or not self._wire.update_deltas:
            return None
        base, old = self._held
        try:
            frame = self._server.delta(self._run, ref, base)
        except NotFound:
            return None
        require_kind(frame, "delta")
        if {name: spec.shape for name, spec in frame.specs.items()} != {
            name: tuple(tensor.shape) for name, tensor in old.items()
        }:
            raise MalformedFrame("a change has other tensors than the state", field="tensors")
        return state_bytes(applied(old, frame.tensors()))
