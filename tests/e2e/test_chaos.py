"""Faults in runs of real processes: each run ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

from sfprompt_bench.chaos.campaign import Campaign
from sfprompt_bench.chaos.execution import RunResult
from sfprompt_bench.chaos.report import describe_failure

FAULTS = 50


def test_runs_under_fifty_faults_end_in_the_state_of_undisturbed_runs(tmp_path: Path) -> None:
    failures: list[str] = []

    def note(result: RunResult) -> None:
        if result.problems:
            failures.append(describe_failure(result))

    campaign = Campaign(seed=60, faults=FAULTS, folder=tmp_path, jobs=3)
    campaign.prepare()
    campaign.execute(note)
    assert not failures, "\n".join(failures)
    assert len(campaign.injected) >= FAULTS
    assert {result.form for result in campaign.results} == set(campaign.references)
