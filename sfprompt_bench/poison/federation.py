"""The server's federation in this process: database, files and rules, without HTTP and engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import StepLost
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.messages import JoinRequest, RoundView, RunStatus, UpdateMeta
from protocol.plan import RunPlan
from protocol.settings import RunSettings
from split_model.checkpoints.state import device_shapes
from split_server.federation.advance import RunAdvancer
from split_server.federation.credentials import Credentials
from split_server.federation.liveness import Liveness
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


class _NoEngine:
    """Ignores the federation's events: there is no engine, and the server tunes nothing."""

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
        """Return no numbers: there is no engine."""
        return {}

    def trained_state(self, run_id: str, participant_id: str, session: str) -> dict[str, Tensor]:
        """Refuse: there are no sessions."""
        raise StepLost("this federation has no sessions", field="session", value=session)


@dataclass(frozen=True)
class LocalFederation:
    """One run with all its participants.

    Attributes:
        runs: the registry of runs.
        service: handles the requests.
        run: id of the run.
        participants: ids of the participants, in the order of joining.
    """

    runs: RunRegistry
    service: FederationService
    run: str
    participants: tuple[str, ...]

    def state(self) -> dict[str, Tensor]:
        """Return the newest global state."""
        return self.runs.files(self.run).read_state(self.runs.snapshot(self.run).state)

    def is_open(self) -> bool:
        """Whether the run is running; a run that diverges fails."""
        return self.runs.snapshot(self.run).status == RunStatus.RUNNING

    def send(self, updates: Sequence[Mapping[str, Tensor]], samples: int) -> None:
        """Send an update of each participant to the open round."""
        open_round = self.runs.snapshot(self.run).open_round
        if open_round is None:
            return
        meta = UpdateMeta(round=open_round.round, attempt=open_round.attempt, samples=samples)
        for participant, update in zip(self.participants, updates, strict=True):
            tensors = {name: (tensor, "float32") for name, tensor in update.items()}
            data = join_frame(encode_frame("update", meta.model_dump(), tensors))
            once = IdempotentRequest.of(f"{self.run}/{participant}", uuid.uuid4().hex, data)
            self.service.update(self.run, participant, meta, decode_frame(data), once)

    def rounds(self) -> tuple[RoundView, ...]:
        """Return all rounds so far."""
        return self.service.results(self.run).rounds


@contextmanager
def local_federation(
    folder: Path, plan: RunPlan, devices: int, samples: int
) -> Iterator[LocalFederation]:
    """Open a federation in a new folder, with one run that all devices have joined.

    Args:
        folder: folder of all files.
        plan: plan of the run, whose first state is zero.
        devices: number of participants.
        samples: number of samples of each participant.
    """
    store, clock, no_engine = Store(folder / "server.sqlite"), Clock(), _NoEngine()
    try:
        liveness = Liveness(_LIVE_S, clock)
        runs = RunRegistry(folder, store, Meter(), no_engine, clock)
        advancer = RunAdvancer(runs, liveness)
        credentials = Credentials(b"-" * 32, "-")
        service = FederationService(runs, advancer, credentials, liveness, no_engine, _prepare)
        run = service.create(Custom.of(plan), IdempotentRequest.of("create", "run")).id
        joined = []
        for number in range(devices):
            request = JoinRequest(
                name=f"device-{number}",
                train_samples=samples,
                test_samples=0,
                num_classes=plan.model.num_classes,
            )
            once = IdempotentRequest.of(f"{run}/join", str(number))
            joined.append(service.join(run, request, once).participant)
        yield LocalFederation(runs, service, run, tuple(joined))
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
