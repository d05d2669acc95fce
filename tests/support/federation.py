"""Support for the server's tests: a fake clock, small runs, a federation without weights."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protocol.errors import Busy
from protocol.federation import FederationSettings
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.messages import Assignment, EvaluationReport, JoinRequest, UpdateMeta
from protocol.plan import ModelPlan, RunPlan, TrainingPlan, WirePlan
from protocol.settings import RunSettings
from split_model.checkpoints.state import state_shapes
from split_server.federation.advance import RunAdvancer
from split_server.federation.credentials import Credentials
from split_server.federation.liveness import Liveness
from split_server.federation.reader import RunReader
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

OPERATOR = "operator-token"

Trained = Callable[[], dict[str, Tensor]]

SMALL = ModelPlan(
    backbone="vit_tiny_patch16_224", weights="random:0", image_size=32, cut=1, prompt_count=2
)

SPLIT = SMALL

TOKENS, WIDTH = 1 + 2 + 4, 192  # class token, prompts, 2 x 2 patches


def run_settings(
    *,
    seed: int = 0,
    batch_size: int = 8,
    prompt_at: str = "input",
    wire: Mapping[str, Any] | None = None,
    **federation: Any,
) -> RunPlan:
    """A run of two rounds on an untrained tiny transformer."""
    return RunPlan(
        name="small",
        seed=seed,
        model=SMALL.model_copy(update={"prompt_at": prompt_at}),
        federation=FederationSettings.model_validate({"rounds": 2, **federation}),
        training=TrainingPlan(batch_size=batch_size),
        wire=WirePlan.model_validate(wire or {}),
    )


def busy_error(why: str) -> Busy:
    """The busy error of an engine."""
    return Busy(why, retry_after_s=0.5)


def state_of(value: float, split: ModelPlan = SPLIT) -> dict[str, Tensor]:
    """A global state in which every element has this value."""
    return {name: torch.full(shape, value) for name, shape in state_shapes(split).items()}


def random_state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in sorted(state_shapes(SPLIT).items())
    }


def smashed(batch: int = 2, seed: int = 0) -> Tensor:
    """[B, T, D]"""
    return torch.randn((batch, TOKENS, WIDTH), generator=torch.Generator().manual_seed(seed))


def update_frame(
    state: Mapping[str, Tensor], meta: Mapping[str, Any], codec: str = "float32"
) -> bytes:
    tensors = {name: (tensor, codec) for name, tensor in state.items()}
    return bytes(join_frame(encode_frame("update", meta, tensors)))


def step_frame(kind: str, tensor: Tensor, step: str, round_: int = 1, **extra: Any) -> bytes:
    name = "gradients" if kind == "backward" else "smashed"
    meta = {"step": step, "round": round_, **extra}
    return bytes(join_frame(encode_frame(kind, meta, {name: (tensor, "float32")})))


@dataclass
class FakeClock:
    """A clock that a test advances."""

    now: float = 1000.0

    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, wall=lambda: 1.7e9 + self.now)


def prepare_without_weights(settings: RunSettings, files: RunFiles, _cache: Path) -> PreparedRun:
    """Create the model files of a run, without a backbone."""
    head = write_tensors(files.root, {"head": torch.zeros(4)})
    plan = settings.plan
    state = state_of(0.0, plan.model)
    return PreparedRun(
        backbone_path=files.root / "backbone.safetensors",
        backbone_bytes=1,
        head=head,
        state=files.write_state(state, plan.model.prompt_at),
    )


@dataclass
class RecordingWatcher:
    """A watcher that records its events."""

    events: list[tuple[str, ...]] = field(default_factory=list)

    def changed(self, run: str) -> None:
        self.events.append(("changed", run))

    def round_over(self, run: str) -> None:
        self.events.append(("round over", run))

    def run_over(self, run: str) -> None:
        self.events.append(("run over", run))

    def work(self, run: str) -> dict[str, float]:
        return {}

    def left(self, run: str, participant: str) -> None:
        self.events.append(("left", run, participant))

    def update_settled(self, run: str, participant: str) -> None:
        self.events.append(("update settled", run, participant))


@dataclass
class TrainedStub:
    """The results of sessions on the server, as a test sets them for each participant."""

    results: dict[tuple[str, str], Trained] = field(default_factory=dict)

    def trained_state(self, run: str, participant: str, _session: str) -> dict[str, Tensor]:
        return self.results[run, participant]()


class FederationHarness:
    """A federation on a real database, with a clock that the test moves."""

    def __init__(self, folder: Path, time_: FakeClock | None = None) -> None:
        self.folder = folder
        self.time = time_ or FakeClock()
        self.watcher = RecordingWatcher()
        self.open()

    def open(self) -> None:
        """Open the federation; again after `close` to simulate a restart."""
        clock = self.time.clock()
        self.store = Store(self.folder / "server.sqlite")
        self.meter = Meter()
        self.liveness = Liveness(60.0, clock)
        self.trained = TrainedStub()
        self.runs = RunRegistry(self.folder, self.store, self.meter, self.watcher, clock)
        self.advancer = RunAdvancer(self.runs, self.liveness)
        self.federation = FederationService(
            self.runs,
            self.advancer,
            Credentials(b"s" * 32, OPERATOR),
            self.liveness,
            self.trained,
            prepare_without_weights,
        )
        self.reader = RunReader(self.runs, self.liveness)
        self.runs.load()

    def close(self) -> None:
        self.store.close()

    def create(self, **federation: Any) -> str:
        settings = run_settings(**federation)
        once = IdempotentRequest.of("create", uuid.uuid4().hex)
        return self.federation.create(Custom.of(settings), once).id

    def join(self, run: str, name: str = "a", train: int = 100, test: int = 10) -> str:
        request = JoinRequest(name=name, train_samples=train, test_samples=test, num_classes=10)
        idempotent = IdempotentRequest.of(f"{run}/join", uuid.uuid4().hex)
        return self.federation.join(run, request, idempotent).participant

    def task(self, run: str, participant: str) -> Assignment:
        """Poll as a device does."""
        self.liveness.touch(run, participant)
        self.advancer.advance(run)
        return self.federation.assignment(run, participant)

    def update(
        self,
        run: str,
        participant: str,
        state: Mapping[str, Tensor],
        *,
        round_: int = 1,
        attempt: int = 0,
        samples: int = 10,
        key: str | None = None,
        trained: Trained | None = None,
        **losses: float,
    ) -> None:
        session = None
        if trained is not None:
            session, self.trained.results[run, participant] = "session", trained
        meta = UpdateMeta(round=round_, attempt=attempt, samples=samples, session=session, **losses)
        data = update_frame(state, meta.model_dump())
        idempotent = IdempotentRequest.of(
            f"{run}/{participant}/update", key or uuid.uuid4().hex, data
        )
        self.federation.update(run, participant, meta, decode_frame(data), idempotent)

    def evaluate(
        self,
        run: str,
        participant: str,
        *,
        round_: int = 1,
        attempt: int = 0,
        samples: int = 10,
        correct: int = 5,
        loss_sum: float = 10.0,
        selection_loss: float | None = None,
        key: str | None = None,
    ) -> None:
        report = EvaluationReport(
            round=round_,
            attempt=attempt,
            samples=samples,
            correct=correct,
            loss_sum=loss_sum,
            selection_loss=selection_loss,
            selection_samples=0 if selection_loss is None else 10,
        )
        content = report.model_dump_json().encode()
        idempotent = IdempotentRequest.of(
            f"{run}/{participant}/evaluation", key or uuid.uuid4().hex, content
        )
        self.federation.evaluation(run, participant, report, idempotent)

    def state(self, run: str) -> dict[str, Tensor]:
        """The newest global state, with the server's part."""
        return self.runs.files(run).read_state(self.runs.snapshot(run).state)

    def kinds(self, run: str) -> list[str]:
        """The kinds of the run's events."""
        return [event.kind for event in self.reader.events(run, 0)]


def state_value(harness: FederationHarness, run: str) -> float:
    """The value of every element of the global state, which must be the same."""
    values = {float(value) for tensor in harness.state(run).values() for value in tensor.unique()}
    assert len(values) == 1
    return values.pop()
