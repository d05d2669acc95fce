"""The server's federation in this process: its database, files and rules; no HTTP, no engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import SFPromptError, StepLost
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.messages import JoinRequest, RoundView, RunStatus, UpdateMeta
from protocol.plan import RunPlan
from protocol.settings import RunSettings
from split_model.checkpoints.state import device_shapes
from split_server.federation.advance import RunAdvancer
from split_server.federation.credentials import Credentials
from split_server.federation.liveness import Liveness
from split_server.federation.reader import RunReader
from split_server.federation.records import decline_update
from split_server.federation.runs import RunRegistry
from split_server.federation.service import FederationService
from split_server.models.prepare import PreparedRun
from split_server.runtime.process import Clock
from split_server.storage.database import Store
from split_server.storage.events import IdempotentRequest
from split_server.storage.run_files import RunFiles
from split_server.storage.tensor_files import write_tensors
from split_server.storage.traffic import Meter
from tuning_methods.custom.settings import Custom

_LIVE_S = 86_400.0


class _Quiet:
    """No engine follows the federation's events, and nothing is tuned on the server."""

    def changed(self, run_id: str) -> None:
        """Ignore it."""

    def round_over(self, run_id: str) -> None:
        """Ignore it."""

    def run_over(self, run_id: str) -> None:
        """Ignore it."""

    def left(self, run_id: str, participant_id: str) -> None:
        """Ignore it."""

    def update_settled(self, run_id: str, participant_id: str) -> None:
        """Ignore it."""

    def work(self, run_id: str) -> Mapping[str, float]:
        """Return nothing: there is no engine."""
        return {}

    def trained_state(self, run_id: str, participant_id: str, session: str) -> dict[str, Tensor]:
        """Refuse: there are no sessions."""
        raise StepLost("this federation has no sessions", field="session", value=session)


@dataclass(frozen=True)
class LocalFederation:
    """One run with all its participants.

    Attributes:
        runs: the registry.
        service: receives the requests.
        run: the run's id.
        participants: their ids, in the order of joining.
    """

    runs: RunRegistry
    service: FederationService
    reader: RunReader
    run: str
    participants: tuple[str, ...]

    def state(self) -> dict[str, Tensor]:
        """Return the newest global state."""
        return self.runs.files(self.run).read_state(self.runs.snapshot(self.run).state)

    def is_open(self) -> bool:
        """Whether the run still trains; a run that has diverged has failed."""
        return self.runs.snapshot(self.run).status == RunStatus.RUNNING

    def send(self, updates: Mapping[int, Mapping[str, Tensor]], samples: Sequence[int]) -> None:
        """Send updates of participants, by their place, to the open round.

        Args:
            updates: whole states.
            samples: of each participant.
        """
        open_round = self.runs.snapshot(self.run).open_round
        if open_round is None:
            return
        for place, update in updates.items():
            participant = self.participants[place]
            meta = UpdateMeta(
                round=open_round.round, attempt=open_round.attempt, samples=samples[place]
            )
            tensors = {name: (tensor, "float32") for name, tensor in update.items()}
            data = join_frame(encode_frame("update", meta.model_dump(), tensors))
            once = IdempotentRequest.of(f"{self.run}/{participant}", uuid.uuid4().hex, data)
            self.service.update(self.run, participant, meta, decode_frame(data), once)

    def decline(self, place: int, error: SFPromptError) -> None:
        """End a participant's part in the open round, as the server does after wrong sums."""
        run = self.runs.snapshot(self.run)
        if run.open_round is not None:
            with self.runs.changing(self.run) as session:
                decline_update(
                    session, self.run, run.open_round, self.participants[place], error, 0.0
                )

    def rounds(self) -> tuple[RoundView, ...]:
        """Return the rounds so far."""
        return self.reader.results(self.run).rounds


@contextmanager
def local_federation(
    folder: Path, plan: RunPlan, samples: Sequence[int]
) -> Iterator[LocalFederation]:
    """Open a federation in a new folder, with one run that all devices have joined.

    Args:
        folder: of its files.
        plan: the run's; its state begins with zeros.
        samples: of each participant.
    """
    store, clock, quiet = Store(folder / "server.sqlite"), Clock(), _Quiet()
    try:
        liveness = Liveness(_LIVE_S, clock)
        runs = RunRegistry(folder, store, Meter(), quiet, clock)
        advancer = RunAdvancer(runs, liveness)
        credentials = Credentials(b"-" * 32, "-")
        service = FederationService(runs, advancer, credentials, liveness, quiet, _prepare)
        run = service.create(Custom.of(plan), IdempotentRequest.of("create", "run")).id
        joined = []
        for number, count in enumerate(samples):
            request = JoinRequest(
                name=f"device-{number}",
                train_samples=count,
                test_samples=0,
                num_classes=plan.model.num_classes,
            )
            once = IdempotentRequest.of(f"{run}/join", str(number))
            joined.append(service.join(run, request, once).participant)
        yield LocalFederation(runs, service, RunReader(runs, liveness), run, tuple(joined))
    finally:
        store.close()


def _prepare(settings: RunSettings, files: RunFiles, _cache: Path) -> PreparedRun:
    model = settings.plan.model
    state = {name: torch.zeros(shape) for name, shape in device_shapes(model).items()}
    return PreparedRun(
        backbone_path=files.root / "backbone.safetensors",
        backbone_bytes=1,
        head=write_tensors(files.root, {"head": torch.zeros(1)}),
        state=files.write_state(state, model.prompt_at),
    )
