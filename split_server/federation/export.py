"""Export the tuned model of a run from the server's data folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from sqlalchemy import select
from sqlalchemy.orm import Session
from torch import Tensor

from protocol.errors import InvalidField, NotFound
from protocol.messages import BlobRef, RoundStatus
from split_model.checkpoints.export import ExportedModel, export_model, load_exported
from split_model.checkpoints.export_format import ExportFormat
from split_model.checkpoints.formats import write_onnx, write_program, write_timm
from split_model.checkpoints.head_file import head_weights
from split_server.closed_form.basis import read_basis
from split_server.federation.model_card import write_card
from split_server.federation.snapshot import RunSnapshot, load_snapshot
from split_server.storage.data_dir import database_in
from split_server.storage.database import RoundRow, RunRow, Store
from split_server.storage.run_files import RunFiles, StateRefs

NEWEST, BEST = "newest", "best"

_WRITERS: Mapping[ExportFormat, Callable[[ExportedModel, Path], None]] = {
    ExportFormat.TIMM: write_timm,
    ExportFormat.ONNX: write_onnx,
    ExportFormat.PT2: write_program,
}


@dataclass(frozen=True)
class RoundState:
    """A run's global state after one of its rounds.

    Attributes:
        run: the run.
        round: the round that produced the state.
        tensors: its device's and its server's part.
    """

    run: RunSnapshot
    round: int
    tensors: dict[str, Tensor]


def export_run(
    data_dir: Path,
    run_id: str,
    out: Path,
    kind: ExportFormat = ExportFormat.SAFETENSORS,
    round_: str = NEWEST,
) -> None:
    """Write the complete model with a run's global state to a file, and its card beside it.

    Args:
        data_dir: data folder of the server.
        run_id: the run.
        out: file to write; a folder in timm's format.
        kind: the format.
        round_: a round's number, ``newest``, or ``best``: that of the highest accuracy.

    Raises:
        NotFound: the folder contains no such run, or the run no such round.
        InvalidField: one of its files is damaged, the round's state is no longer complete, or the
            format cannot hold the model.
    """
    state = read_round_state(data_dir, run_id, round_)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        file = out if kind == ExportFormat.SAFETENSORS else Path(folder) / "model.safetensors"
        _write_safetensors(data_dir, state, file)
        if kind in _WRITERS:
            _WRITERS[kind](load_exported(file), out)
    write_card(data_dir, state.run, state.round, kind, out)


def newest_state(data_dir: Path, run_id: str) -> tuple[RunSnapshot, dict[str, Tensor]]:
    """Load a run and its newest global state; raises as `read_round_state` does."""
    state = read_round_state(data_dir, run_id)
    return state.run, state.tensors


def read_round_state(data_dir: Path, run_id: str, round_: str = NEWEST) -> RoundState:
    """Load a run and its global state after a round, as `export_run` names it.

    A tail that reads features in a basis is converted to one that reads the tokens themselves.

    Raises:
        NotFound: the folder contains no such run, or the run no such round.
        InvalidField: a file is damaged, or the round's state is no longer complete.
    """
    store = Store(database_in(data_dir))
    try:
        with store.reading() as session:
            if session.get(RunRow, run_id) is None:
                raise NotFound("there is no such run", field="run", value=run_id)
            run = load_snapshot(session, run_id, data_dir)
            number, refs = _find_state(session, run, round_)
    finally:
        store.close()
    files = RunFiles(data_dir / "runs" / run_id)
    if refs != run.state and (run.state.server is not None or run.renewed):
        raise InvalidField(
            "the server keeps its part of the model only of the newest round",
            field="round",
            limit=NEWEST,
            value=round_,
        )
    tensors = files.read_state(refs)
    if run.plan.model.rank:
        tensors |= read_basis(run.basis_file(files), torch.device("cpu")).without_basis(tensors)
    return RoundState(run, number, tensors)


def _find_state(session: Session, run: RunSnapshot, round_: str) -> tuple[int, StateRefs]:
    """Return the number of a round and the files of its state that the server still has."""
    if round_ == NEWEST:
        return run.round, run.state
    closed = [
        row
        for row in session.scalars(
            select(RoundRow)
            .where(RoundRow.run_id == run.id, RoundRow.status == RoundStatus.CLOSED)
            .order_by(RoundRow.round)
        )
        if row.state_sha256 is not None
    ]
    newest = max((row.round for row in closed if row.kept), default=None)
    if round_ == BEST:
        closed = [row for row in closed if row.accuracy is not None]
        closed.sort(key=lambda row: (-(row.accuracy or 0.0), row.round))
    else:
        closed = [row for row in closed if str(row.round) == round_]
    if not closed:
        raise NotFound(
            "the run has closed no such round",
            field="round",
            limit=f"{NEWEST}, {BEST}, or a number up to {run.closed_rounds}",
            value=round_,
        )
    row = closed[0]
    if row.round == newest:
        return row.round, run.state
    return row.round, StateRefs(BlobRef(sha256=row.state_sha256 or "", nbytes=row.state_nbytes))


def _write_safetensors(data_dir: Path, state: RoundState, out: Path) -> None:
    run = state.run
    metadata = {"run": run.id, "name": run.plan.name, "round": str(state.round)}
    cache = data_dir / "backbones"
    model = run.method.prepare_export(run.plan, Path(run.backbone_path), state.tensors, cache)
    head = None
    if model.uses_head_file:
        head = head_weights(RunFiles(data_dir / "runs" / run.id).head)
    plan = model.plan.replace(rank=0)  # its tail reads all elements; see `read_round_state`
    classes = run.plan.class_names
    export_model(plan, model.weights, model.state, out, metadata, classes, head)
