"""The federation's files, and how it resumes from them after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.messages import Task
from split_server.storage.events import IdempotentRequest
from split_server.storage.traffic import SocketCounter
from tests.support.federation import FederationHarness, bench, everywhere, state_of


@pytest.fixture
def site(tmp_path: Path) -> Iterator[FederationHarness]:
    with bench(tmp_path) as made:
        yield made


def test_a_restart_resumes_the_open_round(site: FederationHarness) -> None:
    run = site.create(min_participants=3, participants_per_round=2, evaluate_every=0)
    who = [site.join(run, name) for name in "abc"]
    sampled = site.runs.snapshot(run).open_round.sampled  # type: ignore[union-attr]
    site.update(run, sampled[0], state_of(1.0), key="k")
    site.close()
    site.open()
    opened = site.runs.snapshot(run).open_round
    assert opened is not None
    assert opened.sampled == sampled
    assert opened.updated == {sampled[0]}
    site.update(run, sampled[0], state_of(1.0), key="k")
    site.update(run, sampled[1], state_of(3.0))
    assert everywhere(site, run) == 2.0
    # The next round waits until all three have called, or might have.
    assert site.runs.snapshot(run).open_round is None
    for one in who:
        site.task(run, one)
    assert site.runs.snapshot(run).open_round is not None


def test_after_a_restart_a_round_waits_for_silent_participants_for_the_window_only(
    site: FederationHarness,
) -> None:
    run = site.create(min_participants=2, evaluate_every=0, rounds=3)
    a, b = site.join(run, "a"), site.join(run, "b")
    for one in (a, b):
        site.update(run, one, state_of(1.0))
    site.close()
    site.open()
    site.update(run, a, state_of(1.0), round_=2)
    site.update(run, b, state_of(1.0), round_=2)
    assert site.task(run, a).task is Task.WAIT
    site.time.now += 61
    assert site.task(run, a).task is Task.TRAIN
    opened = site.runs.snapshot(run).open_round
    assert opened is not None
    assert opened.sampled == (a,)


def test_a_restart_resumes_an_evaluation(site: FederationHarness) -> None:
    run = site.create(min_participants=2, rounds=1)
    a, b = site.join(run, "a"), site.join(run, "b")
    for one in (a, b):
        site.update(run, one, state_of(1.0))
    site.evaluate(run, a, correct=10)
    site.close()
    site.open()
    assert site.task(run, a).task is Task.WAIT
    assert site.task(run, b).task is Task.EVALUATE
    site.evaluate(run, b, correct=0)
    assert site.federation.results(run).rounds[0].accuracy == 0.5


def test_the_deadline_starts_anew_after_a_restart(site: FederationHarness) -> None:
    run = site.create(round_timeout_s=10, max_repeats=0)
    a = site.join(run)
    site.time.now += 9
    site.close()
    site.open()
    site.time.now += 9
    assert site.task(run, a).task is Task.TRAIN


def test_files_left_by_a_crash_are_removed(site: FederationHarness) -> None:
    run = site.create(min_participants=2)
    a = site.join(run, "a")
    site.join(run, "b")
    site.update(run, a, state_of(1.0))
    files = site.runs.files(run)
    [kept] = (files.root / "updates").iterdir()
    (files.root / "updates" / "half.tmp").write_bytes(b"x")
    half_made, foreign = (site.folder / "runs" / name for name in ("r0123456789", "resnet"))
    half_made.mkdir()
    foreign.mkdir()
    site.close()
    site.open()
    assert list((files.root / "updates").iterdir()) == [kept]
    assert not half_made.exists()
    assert foreign.exists(), "whatever is not of the server's making stays"


def test_updates_are_removed_with_their_round(site: FederationHarness) -> None:
    run = site.create(evaluate_every=0)
    a = site.join(run)
    site.update(run, a, state_of(1.0))
    assert not list((site.runs.files(run).root / "updates").iterdir())


def test_updates_are_removed_with_a_cancelled_run(site: FederationHarness) -> None:
    run, other = (site.create(min_participants=2, prompt_at="cut") for _ in range(2))
    tail = {name: tensor for name, tensor in state_of(1.0).items() if name != "prompts"}
    prompts = {"prompts": state_of(1.0)["prompts"].unsqueeze(0)}
    for one in (run, other):
        a, _ = site.join(one, "a"), site.join(one, "b")
        site.update(one, a, tail, trained=lambda: prompts)
    site.federation.cancel(run, IdempotentRequest.of(f"{run}/cancel", "k"))
    assert not list((site.runs.files(run).root / "updates").iterdir())
    assert len(list((site.runs.files(other).root / "updates").iterdir())) == 1
    assert everywhere(site, run) == 0.0, "its states stay, the server's parts too"


def test_each_round_is_charged_its_traffic_across_a_restart(
    site: FederationHarness,
) -> None:
    run = site.create(evaluate_every=0)
    a = site.join(run)

    def moved(nbytes: int) -> None:
        counter = SocketCounter(received=nbytes, sent=1)
        site.meter.charge(counter, run, a, f"/v1/runs/{run}/update")

    moved(100)
    site.update(run, a, state_of(1.0))
    moved(10)
    site.runs.save_traffic()
    site.close()
    site.open()
    moved(1)
    site.update(run, a, state_of(1.0), round_=2)
    moved(7)
    results = site.federation.results(run)
    assert [view.traffic["updates"]["up"] for view in results.rounds] == [100, 11]
    assert results.traffic == {"updates": {"up": 118, "down": 4}}
    assert results.participants[0].traffic == results.traffic


def test_traffic_that_could_not_be_saved_is_saved_later(
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = {run: site.join(run) for run in (site.create() for _ in range(3))}
    for run, participant in who.items():
        counter = SocketCounter(received=100, sent=10)
        site.meter.charge(counter, run, participant, f"/v1/runs/{run}/update")

    def full_disk(*_args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(site.meter, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            site.runs.save_traffic()
    site.runs.save_traffic()
    assert not site.meter.take_dirty()
    site.close()
    site.open()
    for run in who:
        assert site.federation.results(run).traffic == {"updates": {"up": 100, "down": 10}}


def test_a_failed_change_changes_nothing(
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.create(min_participants=2)
    a = site.join(run, "a")
    site.join(run, "b")
    before = site.runs.snapshot(run), site.kinds(run)

    def full_disk(*_args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(IdempotentRequest, "remember", full_disk)
        with pytest.raises(OSError, match="no space"):
            site.update(run, a, state_of(1.0), key="k")
    assert (site.runs.snapshot(run), site.kinds(run)) == before
    site.update(run, a, state_of(1.0), key="k")
    assert site.kinds(run)[-1] == "update_counted"


def test_a_moved_data_folder_finds_its_backbones(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with bench(old) as site:
        run = site.create(min_participants=2)
        before = Path(site.runs.snapshot(run).backbone_path)
        site.close()
        old.rename(new)
        site.folder = new
        site.open()
        assert Path(site.runs.snapshot(run).backbone_path) == new / before.relative_to(old)
