"""The federation's files, and how it resumes from them after a restart."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from protocol.messages import Task
from split_server.storage.events import IdempotentRequest
from split_server.storage.run_files import RunFiles
from split_server.storage.traffic import SocketCounter
from tests.support.federation import FederationHarness, state_of, state_value


def test_a_restart_resumes_the_open_round(harness: FederationHarness) -> None:
    run = harness.create(min_participants=3, participants_per_round=2, evaluate_every=0)
    who = [harness.join(run, name) for name in "abc"]
    sampled = harness.runs.snapshot(run).open_round.sampled  # type: ignore[union-attr]
    harness.update(run, sampled[0], state_of(1.0), key="k")
    harness.close()
    harness.open()
    opened = harness.runs.snapshot(run).open_round
    assert opened is not None
    assert opened.sampled == sampled
    assert opened.updated == {sampled[0]}
    harness.update(run, sampled[0], state_of(1.0), key="k")
    harness.update(run, sampled[1], state_of(3.0))
    assert state_value(harness, run) == 2.0
    # The next round waits until all three have called, or might have.
    assert harness.runs.snapshot(run).open_round is None
    for one in who:
        harness.task(run, one)
    assert harness.runs.snapshot(run).open_round is not None


def test_after_a_restart_a_round_waits_for_silent_participants_for_the_window_only(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=2, evaluate_every=0, rounds=3)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    for one in (a, b):
        harness.update(run, one, state_of(1.0))
    harness.close()
    harness.open()
    harness.update(run, a, state_of(1.0), round_=2)
    harness.update(run, b, state_of(1.0), round_=2)
    assert harness.task(run, a).task is Task.WAIT
    harness.time.now += 61
    assert harness.task(run, a).task is Task.TRAIN
    opened = harness.runs.snapshot(run).open_round
    assert opened is not None
    assert opened.sampled == (a,)


def test_a_restart_resumes_an_evaluation(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, rounds=1)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    for one in (a, b):
        harness.update(run, one, state_of(1.0))
    harness.evaluate(run, a, correct=10)
    harness.close()
    harness.open()
    assert harness.task(run, a).task is Task.WAIT
    assert harness.task(run, b).task is Task.EVALUATE
    harness.evaluate(run, b, correct=0)
    assert harness.reader.results(run).rounds[0].accuracy == 0.5


def test_the_deadline_restarts_with_the_server(harness: FederationHarness) -> None:
    run = harness.create(round_timeout_s=10, max_repeats=0)
    a = harness.join(run)
    harness.time.now += 9
    harness.close()
    harness.open()
    harness.time.now += 9
    assert harness.task(run, a).task is Task.TRAIN


def test_files_left_by_a_crash_are_removed(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2)
    a = harness.join(run, "a")
    harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    files = harness.runs.files(run)
    [received] = (files.root / "updates").iterdir()
    (files.root / "updates" / "half.tmp").write_bytes(b"x")
    incomplete, foreign = (harness.folder / "runs" / name for name in ("calm-otter-2345", "resnet"))
    incomplete.mkdir()
    foreign.mkdir()
    harness.close()
    harness.open()
    assert list((files.root / "updates").iterdir()) == [received]
    assert not incomplete.exists()
    assert foreign.exists(), "the server deletes only its own folders"


def test_updates_are_removed_with_their_round(harness: FederationHarness) -> None:
    run = harness.create(evaluate_every=0)
    a = harness.join(run)
    harness.update(run, a, state_of(1.0))
    assert not list((harness.runs.files(run).root / "updates").iterdir())


def test_updates_are_removed_with_a_cancelled_run(harness: FederationHarness) -> None:
    run, other = (harness.create(min_participants=2, prompt_at="cut") for _ in range(2))
    tail = {name: tensor for name, tensor in state_of(1.0).items() if name != "prompts"}
    prompts = {"prompts": state_of(1.0)["prompts"].unsqueeze(0)}
    for one in (run, other):
        a, _ = harness.join(one, "a"), harness.join(one, "b")
        harness.update(one, a, tail, trained=lambda: prompts)
    harness.federation.cancel(run, IdempotentRequest.of(f"{run}/cancel", "k"))
    assert not list((harness.runs.files(run).root / "updates").iterdir())
    assert len(list((harness.runs.files(other).root / "updates").iterdir())) == 1
    assert state_value(harness, run) == 0.0, "its states stay, the server's parts too"


def test_each_round_is_charged_its_traffic_across_a_restart(
    harness: FederationHarness,
) -> None:
    run = harness.create(evaluate_every=0)
    a = harness.join(run)

    def moved(nbytes: int) -> None:
        counter = SocketCounter(received=nbytes, sent=1)
        harness.meter.charge(counter, run, a, f"/v1/runs/{run}/update")

    moved(100)
    harness.update(run, a, state_of(1.0))
    moved(10)
    harness.runs.save_traffic()
    harness.close()
    harness.open()
    moved(1)
    harness.update(run, a, state_of(1.0), round_=2)
    moved(7)
    results = harness.reader.results(run)
    assert [view.traffic["updates"]["up"] for view in results.rounds] == [100, 11]
    assert results.traffic == {"updates": {"up": 118, "down": 4}}
    assert results.participants[0].traffic == results.traffic


def test_traffic_that_could_not_be_saved_is_saved_later(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = {run: harness.join(run) for run in (harness.create() for _ in range(3))}
    for run, participant in who.items():
        counter = SocketCounter(received=100, sent=10)
        harness.meter.charge(counter, run, participant, f"/v1/runs/{run}/update")

    def full_disk(*_args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(harness.meter, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            harness.runs.save_traffic()
    harness.runs.save_traffic()
    assert not harness.meter.take_dirty()
    harness.close()
    harness.open()
    for run in who:
        assert harness.reader.results(run).traffic == {"updates": {"up": 100, "down": 10}}


def test_a_failed_change_changes_nothing(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(min_participants=2)
    a = harness.join(run, "a")
    harness.join(run, "b")
    before = harness.runs.snapshot(run), harness.kinds(run)

    def full_disk(*_args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(IdempotentRequest, "remember", full_disk)
        with pytest.raises(OSError, match="no space"):
            harness.update(run, a, state_of(1.0), key="k")
    assert (harness.runs.snapshot(run), harness.kinds(run)) == before
    harness.update(run, a, state_of(1.0), key="k")
    assert harness.kinds(run)[-1] == "update_counted"


def test_a_moved_data_folder_finds_its_backbones(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with closing(FederationHarness(old)) as harness:
        run = harness.create(min_participants=2)
        before = Path(harness.runs.snapshot(run).backbone_path)
        harness.close()
        old.rename(new)
        harness.folder = new
        harness.open()
        assert Path(harness.runs.snapshot(run).backbone_path) == new / before.relative_to(old)


def test_a_round_is_evaluated_although_the_server_died_before_its_state_was_written(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(min_participants=2, rounds=1)
    a, b = harness.join(run, "a"), harness.join(run, "b")

    def die(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunFiles, "write_state", die)
        for one in (a, b):
            harness.update(run, one, state_of(1.0))
    harness.close()
    harness.open()
    assert harness.task(run, a).task is Task.WAIT  # for b, which calls too
    assert harness.task(run, b).task is Task.EVALUATE
    for one in (a, b):
        harness.evaluate(run, one, correct=10)
    (only,) = harness.reader.results(run).rounds
    assert (only.accuracy, only.evaluation_samples) == (1.0, 20)


def test_a_damaged_update_repeats_the_round_and_names_the_file(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=2, rounds=1, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    (file,) = (harness.runs.files(run).root / "updates").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    harness.update(run, b, state_of(3.0))
    (event,) = [e for e in harness.reader.events(run, 0) if e.kind == "round_repeated"]
    assert file.name in event.data["reason"]
    assert harness.task(run, a).attempt == 1
    for one in (a, b):
        harness.update(run, one, state_of(2.0), attempt=1)
    assert state_value(harness, run) == 2.0


def test_files_that_a_killed_server_had_not_finished_are_removed(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=1)
    folders = [harness.runs.files(run).root / name for name in ("states", "basis", "moments")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / ".x.safetensors.1.abcd.tmp").write_bytes(b"half")
    harness.close()
    harness.open()
    assert not [path for folder in folders for path in folder.glob(".*")]
    assert list(folders[0].iterdir())
