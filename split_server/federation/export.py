"""Export the tuned model of a run as one file from the server's data folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import NotFound
from split_model.checkpoints.export import export_model
from split_model.checkpoints.head_file import head_weights
from split_server.closed_form.basis import read_basis
from split_server.federation.snapshot import RunSnapshot, load_snapshot
from split_server.storage.data_dir import database_in
from split_server.storage.database import RunRow, Store
from split_server.storage.run_files import RunFiles


def export_run(data_dir: Path, run_id: str, out: Path) -> None:
    """Write the complete model with a run's newest global state to a file.

    Args:
        data_dir: data folder of the server.
        run_id: the run.
        out: file to write.

    Raises:
        NotFound: the folder contains no such run.
        InvalidField: one of its files is damaged.
    """
    run, state = newest_state(data_dir, run_id)
    metadata = {"run": run.id, "name": run.plan.name, "round": str(run.round)}
    classes = run.plan.class_names
    cache = data_dir / "backbones"
    model = run.method.prepare_export(run.plan, Path(run.backbone_path), state, cache)
    head = None
    if model.uses_head_file:
        head = head_weights(RunFiles(data_dir / "runs" / run_id).head)
    plan = model.plan.replace(rank=0)  # its tail reads all elements; see `newest_state`
    export_model(plan, model.weights, model.state, out, metadata, classes, head)


def newest_state(data_dir: Path, run_id: str) -> tuple[RunSnapshot, dict[str, Tensor]]:
    """Load a run and its newest global state, with the device's and the server's part.

    A tail that reads features in a basis is converted to one that reads the tokens themselves.

    Raises:
        NotFound: the folder contains no such run.
    """
    store = Store(database_in(data_dir))
    try:
        with store.reading() as session:
            if session.get(RunRow, run_id) is None:
                raise NotFound("there is no such run", field="run", value=run_id)
            run = load_snapshot(session, run_id, data_dir)
    finally:
        store.close()
    files = RunFiles(data_dir / "runs" / run_id)
    state = files.read_state(run.state)
    if run.plan.model.rank:
        state |= read_basis(run.basis_file(files), torch.device("cpu")).without_basis(state)
    return run, state
