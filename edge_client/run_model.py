"""The run's model on this device: downloaded, loaded, and kept up to date with the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_client.model import Compute, Model, check_compute, load_model
from edge_client.policy import DevicePolicy
from edge_client.storage.blob_cache import BlobCache
from edge_client.storage.global_state import GlobalStates
from edge_client.storage.run_memory import RunMemory
from edge_client.transport.client import Server
from edge_client.transport.response import Body
from protocol.arrays import Array
from protocol.errors import NotFound, StaleRound
from protocol.messages import Assignment, BlobRef, RunView, UpdateMeta


class RunModel:
    """Head, prompts and tail of a run, kept at the server's newest head and global state.

    Create it with `download`.

    Attributes:
        run: the server's view of the run at the download.
        files: cache of the server's files.
        head: reference of the loaded head file.
        model: the loaded model; a new object after each new head.
    """

    def __init__(
        self,
        server: Server,
        run: RunView,
        files: BlobCache,
        states: GlobalStates,
        model: Model,
        policy: DevicePolicy,
        compute: Compute,
    ) -> None:
        self._server = server
        self.run = run
        self.files = files
        self.head = run.head
        self._states = states
        self._policy = policy
        self.model = model
        self._compute: Compute = compute

    @classmethod
    def download(
        cls,
        server: Server,
        run: RunView,
        files: BlobCache,
        memory: RunMemory | None = None,
        policy: DevicePolicy | None = None,
        compute: Compute = "auto",
    ) -> RunModel:
        """Download head and global state, unless they are in the cache, and load them.

        Args:
            server: authenticated.
            run: as the server described it.
            files: caches the files.
            memory: of a device that sends updates.
            policy: what this device takes part in; None: the default policy.
            compute: the library that computes.

        Raises:
            RefusedByDevice: the policy forbids the run or the size of its files.
            MalformedFrame: a file is damaged or belongs to another model.
            InvalidField: the run needs torch, which is not installed or not allowed.
        """
        policy = policy or DevicePolicy()
        policy.check_run(run)
        check_compute(run, compute)
        try:
            head = _fetch_head(server, run, run.head, files)
        except NotFound:  # the run has a newer head than when the device joined
            run = server.run(run.id)
            policy.check_run(run)
            head = _fetch_head(server, run, run.head, files)
        states = GlobalStates(server, run.id, run.plan.wire, files, memory)
        model = load_model(run, head, states.fetch(run.state), compute)
        return cls(server, run, files, states, model, policy, compute)

    def update(self, assignment: Assignment) -> bool:
        """Load the assignment's head and global state.

        Returns:
            Whether the head is new.

        Raises:
            RefusedByDevice: the files are larger than the device's policy allows.
            StaleRound: the run already has a newer head.
        """
        self._policy.check_download(assignment.head or self.head, assignment.state)
        new_head = assignment.head is not None and assignment.head != self.head
        if assignment.head is not None and new_head:
            self._load_head(assignment.head, assignment.state)
        self.model.load_global_state(self._states.fetch(assignment.state))
        self.files.drop_old(keep={self.head.sha256})
        return new_head

    def send_update(self, meta: UpdateMeta, extras: Mapping[str, Array] | None = None) -> None:
        """Send the tuned state to the server.

        Args:
            meta: meta part of the update.
            extras: further tensors of the tuning method, by name; None: none.

        Raises:
            StaleRound: the update's round is over.
            StepLost: the server lost its part of the update.
        """
        self._states.send(meta, self.model.state(), extras)

    def _load_head(self, head: BlobRef, state: BlobRef) -> None:
        try:
            file = _fetch_head(self._server, self.run, head, self.files)
        except NotFound as error:
            raise StaleRound(str(error), field="head", value=head.sha256) from error
        self.head = head
        self.model = load_model(self.run, file, self._states.fetch(state), self._compute)


def _fetch_head(server: Server, run: RunView, head: BlobRef, files: BlobCache) -> Path:
    def download(start: int) -> Body:
        if run.settings.method.rebuilds_head:  # the run may have a newer head by now
            return server.head(run.id, start, head.sha256)
        return server.head(run.id, start)

    return files.fetch(head, download)
