"""Many runs under faults, some at once, until enough faults were injected."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import SFPromptError
from sfprompt_bench.chaos.disk import SmallDisks
from sfprompt_bench.chaos.execution import ChaosRun, RunResult
from sfprompt_bench.chaos.faults import Fault, draw_faults
from sfprompt_bench.chaos.scenarios import FORMS

FAULTS_A_RUN = 24

_POLLS = "assignment"  # a route whose number of requests depends on time

_POLLS_A_RUN = 12  # at least so many

_PROBE_MIB = 1


@dataclass
class Campaign:
    """All runs of a command.

    Args:
        seed: of the first run; each further run has the next.
        faults: to inject.
        folder: for the runs; those without a problem are deleted.
        jobs: runs at once.
        runs: limit of the disturbed runs; None: none.
        minutes: after which no run begins; None: no limit.

    Attributes:
        references: the undisturbed runs, by form.
        results: of the disturbed runs that have ended.
        has_small_disks: whether the system allows disks that can be filled.
    """

    seed: int
    faults: int
    folder: Path
    jobs: int
    runs: int | None = None
    minutes: float | None = None
    references: dict[str, RunResult] = field(default_factory=dict)
    results: list[RunResult] = field(default_factory=list)
    has_small_disks: bool = False
    _started: float = field(default_factory=time.monotonic)

    def prepare(self) -> None:
        """Execute the undisturbed runs.

        Raises:
            SFPromptError: one of them did not finish.
        """
        self.has_small_disks = _allows_small_disks(self.folder)
        with ThreadPoolExecutor(self.jobs) as pool:
            results = pool.map(self._undisturbed, FORMS)
        for result in results:
            outcome = result.outcome
            if result.problems or outcome is None or outcome.status != "finished":
                raise SFPromptError(
                    f"the undisturbed run of {result.form} failed: {'; '.join(result.problems)}",
                    field=str(self.folder / result.form),
                )
            self.references[result.form] = result

    def execute(self, on_result: Callable[[RunResult], None]) -> None:
        """Execute runs until enough faults were injected; call back after each."""
        with ThreadPoolExecutor(self.jobs) as pool:
            running: set[Future[RunResult]] = set()
            while True:
                while len(running) < self.jobs and self._needs_more(len(running)):
                    seed = self.seed + len(self.results) + len(running)
                    running.add(pool.submit(self._disturbed, seed))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    self.results.append(future.result())
                    on_result(self.results[-1])

    @property
    def injected(self) -> list[Fault]:
        """The faults of all runs that were reached."""
        return [fault for result in self.results for fault in result.injected]

    @property
    def failed(self) -> list[RunResult]:
        """The runs with a problem."""
        return [result for result in self.results if result.problems]

    def _needs_more(self, running: int) -> bool:
        if self.runs is not None and len(self.results) + running >= self.runs:
            return False
        if self.minutes is not None and time.monotonic() > self._started + 60 * self.minutes:
            return False
        # A run that is still open reaches about as many faults as it has.
        return len(self.injected) + running * FAULTS_A_RUN < self.faults

    def _undisturbed(self, form: str) -> RunResult:
        shutil.rmtree(self.folder / form, ignore_errors=True)
        return ChaosRun(form, 0, [], self.folder / form).execute()

    def _disturbed(self, seed: int) -> RunResult:
        form = FORMS[seed % len(FORMS)]
        reference = self.references[form]
        requests = {**reference.requests, _POLLS: _POLLS_A_RUN}
        faults = draw_faults(seed, requests, FAULTS_A_RUN, with_disk=self.has_small_disks)
        folder = self.folder / f"run-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        run = ChaosRun(
            form,
            seed,
            faults,
            folder,
            self.folder / form / "server" / "backbones",
            small_disks=self.has_small_disks,
        )
        result = run.execute()
        if result.outcome is not None and reference.outcome is not None:
            result.problems += result.outcome.differences(
                reference.outcome, evaluated=not result.device_ended
            )
        elif not result.problems:
            result.problems.append("the outcome could not be read")
        if not result.problems:
            shutil.rmtree(folder, ignore_errors=True)
        return result


def _allows_small_disks(folder: Path) -> bool:
    try:
        SmallDisks(folder / "probe", _PROBE_MIB).close()
    except SFPromptError:
        return False
    return True
