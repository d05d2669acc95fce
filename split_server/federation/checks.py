"""Which updates of a round count, and how much each weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

from torch import Tensor

from split_server.aggregation.rules import find_refused
from split_server.closed_form.known import KnownSamples, read_known
from split_server.closed_form.result import Solved, read_solved
from split_server.closed_form.steps import (
    Difference,
    measure_start,
    measure_step,
    scaled_classifier,
)
from split_server.federation.rounds import Refusal
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.database import UpdateRow
from split_server.storage.run_files import RunFiles
from split_server.storage.tensor_files import read_tensors


class UpdateChecks:
    """Checks the updates of one attempt at a round.

    With a closed-form start the server knows each participant's features and class sums, and with
    them the updates that are possible. Other updates are bounded relative to each other. The checks
    depend only on files that stay until the result is in the database.

    Args:
        run: the run.
        round_: of the updates.
        attempt: of the updates.
        files: of the run.
    """

    def __init__(self, run: RunSnapshot, round_: int, attempt: int, files: RunFiles) -> None:
        self._plan, self._files, self._round = run.plan, files, round_
        self._start = attempt if round_ == 0 else run.start_attempt  # None: no start
        self._state, self._method = run.state, run.method
        self._known: dict[str, KnownSamples | None] = {}

    def find_refused(self, updates: Sequence[UpdateRow]) -> dict[int, Refusal]:
        """Find the updates that do not count, by position."""
        refused: dict[int, Refusal] = {}
        for position, update in enumerate(updates):
            if self._start is not None and (refusal := self._check(update)) is not None:
                refused[position] = refusal
        rest = [position for position in range(len(updates)) if position not in refused]
        loads = [partial(self._read, updates[position]) for position in rest]
        too_large = find_refused(self._plan.federation, loads, self._before)
        for number, excess in too_large.items():
            sender = updates[rest[number]].participant_id
            refused[rest[number]] = Refusal(sender, "norm_too_large", excess.norm, excess.limit)
        return refused

    def weight(self, update: UpdateRow) -> int:
        """Return an update's weight: at most as many samples as the server has seen."""
        known = self._of(update.participant_id)
        return update.samples if known is None else min(update.samples, len(known.features))

    def start_state(self, updates: Sequence[UpdateRow]) -> dict[str, Tensor] | None:
        """Return the state after round 0; None: another round, or no closed-form start."""
        if self._round > 0 or self._start is None:
            return None
        sent = [(self._read(update), self.weight(update)) for update in updates]
        return {**self._before, **scaled_classifier(self._solved, sent)}

    def _check(self, update: UpdateRow) -> Refusal | None:
        """Check an update of a run with a closed-form start."""
        sender, known = update.participant_id, self._of(update.participant_id)
        if known is not None and known.disagrees is not None:
            required = self._plan.federation.label_agreement
            return Refusal(sender, "labels_disagree", known.disagrees, required)
        tensors, codec = self._read(update), self._plan.wire.updates
        difference: Difference | None = None
        if self._round == 0:
            code, difference = "not_the_start", measure_start(tensors, self._solved, codec)
        elif not self._method.steps_classifier(self._plan):
            return None
        elif known is None or known.sums is None:
            return Refusal(sender, "sums_missing", 0.0, 1.0)
        else:
            code = "not_its_step"
            difference = measure_step(
                tensors,
                self._before,
                known,
                self._solved,
                steps=self._plan.training.local_epochs,
                codec=codec,
            )
        if difference is None or not difference.is_refused:
            return None
        return Refusal(sender, code, difference.norm, difference.limit)

    def _of(self, participant: str) -> KnownSamples | None:
        """Return what is known of a participant's samples."""
        if self._start is None:
            return None
        if participant not in self._known:
            self._known[participant] = read_known(self._files.known(self._start, participant))
        return self._known[participant]

    def _read(self, update: UpdateRow) -> Mapping[str, Tensor]:
        return read_tensors(self._files.update(update.sha256))

    @cached_property
    def _before(self) -> Mapping[str, Tensor]:
        """The global state that the round began with."""
        return self._files.read_state(self._state)

    @cached_property
    def _solved(self) -> Solved:
        if self._start is None:
            raise ValueError("the run has no closed-form start")
        return read_solved(self._files.basis(self._start))
