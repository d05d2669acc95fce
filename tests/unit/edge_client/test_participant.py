"""A device's participation in a run, with a scripted federation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_client.data.dataset import Dataset
from edge_client.data.errors import CorruptImageError
from edge_client.method import DeviceMethod, RoundResult
from edge_client.participant import JoinedRun, Participant, succeeded
from edge_client.reporter import BarReporter, JsonReporter
from edge_client.training import RoundContext
from edge_client.transport.split_client import SplitPlane
from protocol.errors import (
    EmptyUpdate,
    IdempotencyKeyReused,
    InvalidField,
    NonFinite,
    SFPromptError,
    StaleRound,
    Unauthorized,
)
from protocol.messages import (
    Assignment,
    BlobRef,
    EvaluationReport,
    JoinRequest,
    JoinResponse,
    RunStatus,
    RunView,
    Task,
    UpdateMeta,
    UpdateReceipt,
)
from protocol.plan import RunPlan, TrainingPlan
from protocol.traffic import Traffic
from split_model.checkpoints.state import load_state
from tests.support.edge import SMALL, BodyServer, files, image_set
from tuning_methods.custom.settings import Custom


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Script(BodyServer):
    """A federation of one device, with a fixed list of assignments."""

    assignments: list[tuple[Task, int]] = field(default_factory=list)
    refusals: dict[int, SFPromptError] = field(default_factory=dict)  # of updates, by round
    training: dict[str, Any] = field(default_factory=dict)
    model_changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.polled: list[Assignment | None] = []
        self.ended: list[str] = []
        self.updates: list[tuple[UpdateMeta, dict[str, torch.Tensor]]] = []
        self.reports: list[EvaluationReport] = []
        self.downloads: list[str] = []
        self.credential = ""
        run_files = files()
        self._head, self._state = run_files.ref(run_files.head), run_files.ref(run_files.state)

    def join(self, run: str, request: JoinRequest, key: str, token: str | None) -> JoinResponse:
        self.joined = (run, request, key, token)
        training = {"batch_size": 4, "keep_fraction": 0.5, **self.training}
        plan = RunPlan(
            model=SMALL.model_copy(update=self.model_changes),
            training=TrainingPlan.model_validate(training),
        )
        view = RunView(
            id=run,
            status=RunStatus.RUNNING,
            settings=Custom.of(plan),
            plan=plan,
            round=1,
            participants=1,
            created_at=0,
            backbone_bytes=1,
            head=self._head,
            state=self._state,
        )
        return JoinResponse(participant="p-1", credential="secret", run=view)

    def authenticate(self, credential: str) -> None:
        self.credential = credential

    def end(self, run: str, reason: str) -> None:
        self.ended.append(reason)

    def head(self, run: str, start: int = 0) -> bytes:
        self.downloads.append("head")
        return files().head.read_bytes()[start:]

    def state(self, run: str, ref: BlobRef, start: int = 0) -> bytes:
        self.downloads.append("state")
        return files().state.read_bytes()[start:]

    def assignment(self, run: str, after: Assignment | None, wait_s: float) -> Assignment:
        self.polled.append(after)
        task, round_ = self.assignments.pop(0)
        over = task is Task.STOP
        status = RunStatus.FINISHED if over else RunStatus.RUNNING
        return Assignment(task=task, round=round_, state=self._state, status=status)

    def send_update(
        self,
        run: str,
        meta: UpdateMeta,
        state: dict[str, torch.Tensor],
        codec: str,
        extras: dict[str, torch.Tensor],
    ) -> UpdateReceipt:
        assert not extras
        if meta.round in self.refusals:
            raise self.refusals[meta.round]
        self.updates.append((meta, state))
        return UpdateReceipt(round=meta.round, samples=meta.samples)

    def send_evaluation(self, run: str, report: EvaluationReport) -> None:
        self.reports.append(report)

    def traffic(self) -> Traffic:
        return Traffic()


class RecordingReporter:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **data: Any) -> None:
        self.events.append((kind, data))

    def advance(self, phase: str, done: int, total: int) -> None: ...

    def close(self) -> None: ...


def take_part(
    server: Script, folder: Path, name: str = "device"
) -> tuple[RecordingReporter, JoinedRun]:
    reporter = RecordingReporter()
    data = Dataset(image_set(9), image_set(6, seed=1))
    joined = Participant(server, data, folder, name, reporter).join("run", "key", "token")
    assert succeeded(joined.take_part())
    return reporter, joined


TRAIN, EVALUATE, WAIT, STOP = Task.TRAIN, Task.EVALUATE, Task.WAIT, Task.STOP


def test_a_whole_run(tmp_path: Path) -> None:
    script = [(WAIT, 0), (TRAIN, 1), (WAIT, 1), (EVALUATE, 1), (TRAIN, 2), (EVALUATE, 2), (STOP, 2)]
    server = Script(assignments=list(script))
    reporter, _ = take_part(server, tmp_path)
    request = server.joined[1]
    assert server.joined == ("run", request, "key", "token")
    assert (request.train_samples, request.test_samples, request.num_classes) == (9, 6, 3)
    assert server.credential == "secret"
    assert server.downloads == ["head", "state"]
    polled = [(a.task, a.round) if a else None for a in server.polled]
    assert polled == [None, *script[:-1]]
    assert [kind for kind, _ in reporter.events] == [
        "joined",
        *["trained", "evaluated"] * 2,
        "stopped",
    ]
    for round_, (meta, state) in enumerate(server.updates, start=1):
        assert (meta.round, meta.attempt, meta.samples) == (round_, 0, 5)
        assert meta.train_loss is not None
        assert meta.local_loss is not None
        assert set(state) == set(load_state(files().state))
    assert [(r.round, r.samples) for r in server.reports] == [(1, 6), (2, 6)]
    # Only smashed data, gradients and the tuned state leave the device; no labels or images.
    assert set(server.calls) == {"forward", "backward", "infer"}


def test_for_whom_a_run_waits_is_said_once(tmp_path: Path) -> None:
    class Waiting(Script):
        def assignment(self, run: str, after: Assignment | None, wait_s: float) -> Assignment:
            assignment = super().assignment(run, after, wait_s)
            waits = assignment.task is WAIT
            text = "1 of 2 devices: device; 1 more needed" if waits else None
            return assignment.model_copy(update={"waiting": text})

    reporter, _ = take_part(Waiting(assignments=[(WAIT, 0), (WAIT, 0), (STOP, 0)]), tmp_path)
    said = [data for kind, data in reporter.events if kind == "waiting"]
    assert said == [{"reason": "1 of 2 devices: device; 1 more needed"}]


def test_an_assignment_given_twice_is_done_once(tmp_path: Path) -> None:
    script = [(TRAIN, 1), (TRAIN, 1), (TRAIN, 1), (EVALUATE, 1), (EVALUATE, 1), (STOP, 1)]
    server = Script(assignments=script)
    take_part(server, tmp_path)
    assert (len(server.updates), len(server.reports)) == (1, 1)


def test_a_restart_downloads_nothing(tmp_path: Path) -> None:
    take_part(Script(assignments=[(STOP, 1)]), tmp_path)
    again = Script(assignments=[(TRAIN, 1), (STOP, 1)])
    take_part(again, tmp_path)
    assert again.downloads == []


def test_a_restart_repeats_the_same_update(tmp_path: Path) -> None:
    """So that its idempotency key stands for the same bytes."""
    first, second = (Script(assignments=[(TRAIN, 1), (STOP, 1)]) for _ in range(2))
    first.training = second.training = {"augment": True}
    take_part(first, tmp_path)
    take_part(second, tmp_path)
    (first_meta, a), (second_meta, b) = first.updates[0], second.updates[0]
    assert first_meta == second_meta
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_another_device_has_other_draws(tmp_path: Path) -> None:
    first, second = (Script(assignments=[(TRAIN, 1), (STOP, 1)]) for _ in range(2))
    take_part(first, tmp_path)
    take_part(second, tmp_path, name="other")
    assert not np.array_equal(first.updates[0][1]["prompts"], second.updates[0][1]["prompts"])


@pytest.mark.parametrize("error", [StaleRound, IdempotencyKeyReused])
def test_a_device_that_missed_a_round_continues(tmp_path: Path, error: type[SFPromptError]) -> None:
    script = [(TRAIN, 1), (TRAIN, 2), (EVALUATE, 2), (STOP, 2)]
    server = Script(assignments=script, refusals={1: error("round 1 is over")})
    reporter, _ = take_part(server, tmp_path)
    assert [kind for kind, _ in reporter.events][1:] == [
        "left-behind",
        "trained",
        "evaluated",
        "stopped",
    ]
    assert reporter.events[1][1] == {"round": 1, "reason": "round 1 is over"}
    assert [meta.round for meta, _ in server.updates] == [2]


def test_a_stale_round_in_the_middle_of_split_training(tmp_path: Path) -> None:
    class Closing(Script):
        def forward(self, smashed: torch.Tensor, *, round_: int, **more: Any) -> torch.Tensor:
            if round_ == 1 and len(self.calls) > 2:
                raise StaleRound("round 1 is over")
            return super().forward(smashed, round_=round_, **more)

    server = Closing(assignments=[(TRAIN, 1), (TRAIN, 2), (STOP, 2)])
    reporter, _ = take_part(server, tmp_path)
    assert [kind for kind, _ in reporter.events] == ["joined", "left-behind", "trained", "stopped"]
    # Nothing of the round that was given up is in the next one.
    fresh = Script(assignments=[(TRAIN, 2), (STOP, 2)])
    take_part(fresh, tmp_path)
    assert np.array_equal(server.updates[0][1]["prompts"], fresh.updates[0][1]["prompts"])


def test_an_empty_update_is_reported_and_skipped(tmp_path: Path) -> None:
    server = Script(assignments=[(TRAIN, 1), (STOP, 1)], refusals={1: EmptyUpdate("no sample")})
    reporter, _ = take_part(server, tmp_path)
    assert [kind for kind, _ in reporter.events] == ["joined", "nothing-to-train", "stopped"]


def test_a_device_that_cannot_measure_a_state_says_so(tmp_path: Path) -> None:
    class Poisoned(Script):
        def infer(self, smashed: torch.Tensor, **more: Any) -> torch.Tensor:
            return np.full_like(super().infer(smashed, **more), np.nan)

    server = Poisoned(assignments=[(EVALUATE, 1), (STOP, 1)])
    reporter, _ = take_part(server, tmp_path)
    assert [kind for kind, _ in reporter.events] == ["joined", "left-behind", "stopped"]
    [report] = server.reports
    assert (report.round, report.samples, report.correct, report.loss_sum) == (1, 0, 0, 0.0)


@pytest.mark.parametrize("error", [NonFinite, Unauthorized])
def test_a_permanent_error_ends_the_device(tmp_path: Path, error: type[SFPromptError]) -> None:
    server = Script(assignments=[(TRAIN, 1), (STOP, 1)], refusals={1: error("no")})
    with pytest.raises(error):
        take_part(server, tmp_path)
    assert server.ended == [error.code], "it tells why it ends"


def test_a_method_drops_its_caches_by_sample_when_positions_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class UnreadableOnce(DeviceMethod):
        def train_round(self, context: RoundContext, plane: SplitPlane) -> RoundResult:
            calls.append("train")
            assert context.cache_bytes == Participant.cache_bytes
            if len(calls) == 1:
                raise CorruptImageError("image", limit="an image", value="gone")
            return super().train_round(context, plane)

        def drop_sample_caches(self) -> None:
            calls.append("drop")

    method = UnreadableOnce()
    monkeypatch.setattr("edge_client.participant.device_method", lambda _: method)
    server = Script(assignments=[(TRAIN, 1), (STOP, 1)])
    take_part(server, tmp_path)
    assert calls == ["train", "drop", "train"]
    assert len(server.updates) == 1


def test_the_mean_token_is_added_in_the_first_round_alone(tmp_path: Path) -> None:
    still = {"prompt_learning_rate": 0.0, "tail_learning_rate": 0.0, "weight_decay": 0.0}
    server = Script(assignments=[(TRAIN, 1), (TRAIN, 1), (TRAIN, 2), (STOP, 2)], training=still)
    server.model_changes = {"prompt_init": "mean-token"}
    take_part(server, tmp_path)
    start = load_state(files().state)["prompts"].numpy()
    first, second = (state["prompts"] for _, state in server.updates)
    shift = first - start
    assert np.abs(shift).max() > 1e-3
    assert np.allclose(shift, shift[:1], atol=1e-6)
    assert np.array_equal(second, start)


def test_more_classes_than_the_run_has(tmp_path: Path) -> None:
    server = Script(assignments=[])
    server.model_changes = {"num_classes": 2}
    with pytest.raises(InvalidField) as caught:
        take_part(server, tmp_path)
    assert (caught.value.limit, caught.value.value) == (2, 3)
    assert server.downloads == []


def test_a_run_that_failed_did_not_succeed() -> None:
    last = Assignment(
        task=STOP, round=1, state=files().ref(files().state), status=RunStatus.CANCELLED
    )
    assert not succeeded(last)


# Reporters


def test_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = JsonReporter()
    reporter.event("joined", participant="p", path="[/b]")
    for done in range(1, 101):
        reporter.advance("split", done, 100)
    reporter.close()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"event": "joined", "participant": "p", "path": "[/b]"}
    assert lines[-1] == {"event": "progress", "phase": "split", "done": 100, "total": 100}
    assert len(lines) < 10


def test_bars_show_every_text_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    reporter = BarReporter()
    reporter.event("skipped", path="photos/[/red] [bold]x.png", loss=0.123456)
    reporter.advance("split", 1, 2)
    reporter.close()
    assert "skipped  path photos/[/red] [bold]x.png  loss 0.1235" in capsys.readouterr().err
