"""Download a run's global states, and send the device's updates to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_client.storage.blob_cache import BlobCache
from edge_client.storage.run_memory import Residuals, RunMemory
from edge_client.storage.states import (
    Floats,
    State,
    applied,
    difference,
    load_state,
    state_bytes,
)
from edge_client.transport.client import Server
from protocol.arrays import Array
from protocol.codecs.feedback import ErrorFeedback
from protocol.codecs.registry import as_decoded
from protocol.errors import (
    Busy,
    DamagedFrame,
    InternalError,
    MalformedFrame,
    NotFound,
    SFPromptError,
    Unreachable,
)
from protocol.frames import require_kind
from protocol.messages import BlobRef, UpdateMeta
from protocol.plan import WirePlan

# The server may have counted an update although the device got such an error.
_UNDECIDED = (Busy, DamagedFrame, InternalError, Unreachable)


class GlobalStates:
    """The global states of one run, as files and as the base of updates.

    With ``wire.update_deltas`` both directions carry differences from a state that both ends have.
    An update's codec error is added to the next update (error feedback).

    Args:
        server: authenticated.
        run: the run's id.
        wire: the run's wire settings.
        files: caches downloads.
        memory: keeps the codec's error across a restart; None: this process alone has it.
    """

    def __init__(
        self,
        server: Server,
        run: str,
        wire: WirePlan,
        files: BlobCache,
        memory: RunMemory | None = None,
    ) -> None:
        self._server = server
        self._run = run
        self._wire = wire
        self._files = files
        self._memory = memory
        self._residuals = memory.residuals if memory else Residuals()
        self._newest: tuple[BlobRef, State] | None = None

    def fetch(self, ref: BlobRef) -> Path:
        """Return a state's file, downloaded unless it is cached.

        Raises:
            MalformedFrame: the download does not match the hash.
        """
        rebuilt: bytes | None = None  # from a delta; empty: there is no delta

        def download(start: int) -> bytes | bytearray | memoryview:
            nonlocal rebuilt
            if rebuilt is None:
                rebuilt = self._rebuild_from_delta(ref) or b""
            return rebuilt[start:] if rebuilt else self._server.state(self._run, ref, start)

        try:
            path = self._files.fetch(ref, download)
        except MalformedFrame:
            if not rebuilt:
                raise
            # The state rebuilt from the delta differs from the server's: download it whole.
            path = self._files.fetch(ref, lambda start: self._server.state(self._run, ref, start))
        if self._wire.update_deltas:
            self._newest = (ref, load_state(path))
        return path

    def send(
        self,
        meta: UpdateMeta,
        state: Mapping[str, Floats],
        extras: Mapping[str, Array] | None = None,
    ) -> None:
        """Send an update of the state that was fetched last.

        Args:
            meta: describes the update.
            state: the tuned tensors, by name.
            extras: further tensors, by name; sent as float32.

        Raises:
            StaleRound: the update's round is over.
            StepLost: the server lost its part of the update.
        """
        codec = self._wire.updates
        if not self._wire.update_deltas or self._newest is None:
            self._server.send_update(self._run, meta, state, codec, extras)
            return
        base, old = self._newest
        last = self._residuals
        is_repeated = base.sha256 == last.base  # then the round's first update is void
        before = last.before if is_repeated else last.after
        feedback: ErrorFeedback[Floats] = ErrorFeedback(before)
        corrected = {
            name: feedback.add_residual(name, change)
            for name, change in difference(state, old).items()
        }
        for name, value in corrected.items():
            feedback.store_residual(name, value, as_decoded(value, codec))
        meta = meta.model_copy(update={"base": base.sha256})
        # Before the server can count the update: this process may end before it hears of it.
        self._keep(Residuals(base.sha256, before, feedback.residuals()))
        try:
            self._server.send_update(self._run, meta, corrected, codec, extras)
        except SFPromptError as error:
            if not isinstance(error, _UNDECIDED):
                self._keep(Residuals(base.sha256, before, before))
            raise

    def _keep(self, residuals: Residuals) -> None:
        self._residuals = residuals
        if self._memory is not None:
            self._memory.keep_residuals(residuals)

    def _rebuild_from_delta(self, ref: BlobRef) -> bytes | None:
        """Build the state's file from the newest state and a delta; None: there is no delta."""
        if self._newest is None or not self._wire.update_deltas:
            return None
        base, old = self._newest
        try:
            frame = self._server.delta(self._run, ref, base)
        except (DamagedFrame, NotFound):  # the server may have it so: download the whole state
            return None
        require_kind(frame, "delta")
        if {name: spec.shape for name, spec in frame.specs.items()} != {
            name: tuple(tensor.shape) for name, tensor in old.items()
        }:
            raise MalformedFrame("the delta has other tensors than the state", field="tensors")
        return state_bytes(applied(old, frame.arrays()))
