"""How well the state of a round classifies held-out images, from the counts of the devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy.orm import Session

from protocol.errors import NotFound
from protocol.messages import RoundStatus
from protocol.quality import (
    CONFIDENCE_BINS,
    ClassQuality,
    ConfidenceBin,
    DeviceQuality,
    EvaluationView,
    PredictionCounts,
    Quality,
)
from split_server.federation.measurement import read_reports
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.database import EvaluationRow, RoundRow


def evaluation_view(session: Session, run: RunSnapshot, round_: int) -> EvaluationView:
    """Return the evaluation of a round's state.

    Args:
        session: that reads.
        run: the run.
        round_: a closed round.

    Raises:
        NotFound: the run has closed no such round.
    """
    rows = session.query(RoundRow).filter_by(run_id=run.id, round=round_, status=RoundStatus.CLOSED)
    row = rows.one_or_none()
    if row is None:
        raise NotFound("the run has closed no such round", field="round", value=round_)
    reports = read_reports(session, run, round_, row.attempt)
    reports = {id_: report for id_, report in reports.items() if report.samples}
    if not reports:
        return EvaluationView(round=round_)
    counts = [_counts(report) for report in reports.values()]
    known = [each for each in counts if each is not None]
    merged = _merge(known) if len(known) == len(counts) else None
    return EvaluationView(
        round=round_,
        quality=_quality(reports.values(), merged),
        devices=tuple(
            DeviceQuality(
                participant=id_,
                name=run.participants[id_].name,
                quality=_quality([report], _counts(report)),
            )
            for id_, report in reports.items()
        ),
        classes=() if merged is None else tuple(_classes(merged, _names(run))),
        confusion=() if merged is None else merged.confusion,
    )


def _names(run: RunSnapshot) -> Sequence[str]:
    plan = run.plan
    return plan.class_names or tuple(str(number) for number in range(plan.model.num_classes))


def _counts(report: EvaluationRow) -> PredictionCounts | None:
    stored = report.predictions
    return None if stored is None else PredictionCounts.model_validate(stored)


def _merge(devices: Iterable[PredictionCounts]) -> PredictionCounts:
    """Add up the counts of several devices."""
    cells: Counter[tuple[int, int]] = Counter()
    bins = [ConfidenceBin()] * CONFIDENCE_BINS
    for counts in devices:
        cells.update({(label, predicted): n for label, predicted, n in counts.confusion})
        bins = [_add(total, each) for total, each in zip(bins, counts.bins, strict=True)]
    confusion = tuple((*cell, cells[cell]) for cell in sorted(cells))
    return PredictionCounts.model_construct(confusion=confusion, bins=tuple(bins))


def _add(total: ConfidenceBin, each: ConfidenceBin) -> ConfidenceBin:
    return ConfidenceBin(
        samples=total.samples + each.samples,
        correct=total.correct + each.correct,
        confidence_sum=total.confidence_sum + each.confidence_sum,
    )


def _quality(reports: Iterable[EvaluationRow], counts: PredictionCounts | None) -> Quality:
    reports = list(reports)
    samples = sum(report.samples for report in reports)
    return Quality(
        samples=samples,
        accuracy=sum(report.correct for report in reports) / samples,
        loss=sum(report.loss_sum for report in reports) / samples,
        **({} if counts is None else _figures(counts)),
    )


def _figures(counts: PredictionCounts) -> dict[str, float]:
    rows, columns, hits = _sums(counts)
    recalls = [hits[each] / rows[each] for each in rows]
    # F1 = 2 TP / (2 TP + FP + FN), and TP + FN is the row, TP + FP the column
    f1 = [2 * hits[each] / (rows[each] + columns[each]) for each in rows.keys() | columns.keys()]
    distance = sum(abs(each.confidence_sum - each.correct) for each in counts.bins)
    return {
        "majority": max(rows.values()) / counts.samples,
        "balanced_accuracy": sum(recalls) / len(recalls),
        "macro_f1": sum(f1) / len(f1),
        "calibration_error": min(1.0, distance / counts.samples),
    }


def _classes(counts: PredictionCounts, names: Sequence[str]) -> Iterable[ClassQuality]:
    rows, columns, hits = _sums(counts)
    for number, name in enumerate(names):
        samples, predicted, correct = rows[number], columns[number], hits[number]
        yield ClassQuality(
            name=name,
            samples=samples,
            predicted=predicted,
            recall=correct / samples if samples else None,
            precision=correct / predicted if predicted else None,
        )


def _sums(
    counts: PredictionCounts,
) -> tuple[Mapping[int, int], Mapping[int, int], Mapping[int, int]]:
    """Return the images of each class, those predicted as it, and those that are both."""
    rows: Counter[int] = Counter()
    columns: Counter[int] = Counter()
    hits: Counter[int] = Counter()
    for label, predicted, count in counts.confusion:
        rows[label] += count
        columns[predicted] += count
        hits[label] += count if label == predicted else 0
    return rows, columns, hits
