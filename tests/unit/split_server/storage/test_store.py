"""Durable storage: the database, whole files, one server per data folder."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import torch
from sqlalchemy.exc import IntegrityError

from protocol.errors import InvalidField
from protocol.traffic import Traffic
from split_model.files import write_durably
from split_server.storage.data_dir import lock_data_dir
from split_server.storage.database import SCHEMA_VERSION, EventRow, Store
from split_server.storage.run_files import RunFiles, read_prompts
from split_server.storage.tensor_files import read_tensors
from split_server.storage.traffic import Meter, SocketCounter


def test_the_database_is_durable_and_checked(tmp_path: Path) -> None:
    store = Store(tmp_path / "db" / "server.sqlite")
    with store.reading() as session:
        connection = session.connection()
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == value
    with pytest.raises(IntegrityError), store.writing() as session:
        session.add(EventRow(run_id="none", seq=1, at=0.0, kind="k", data={}))
    store.close()


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite"
    Store(path).close()
    Store(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(InvalidField) as caught:
        Store(path)
    assert (caught.value.limit, caught.value.value) == (SCHEMA_VERSION, 99)


def test_a_foreign_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (id INTEGER)")
    connection.close()
    with pytest.raises(InvalidField):
        Store(path)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "file"
    write_durably(path, b"first")

    def crash(_descriptor: int) -> None:
        raise OSError("the power is gone")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="power"):
            write_durably(path, b"second")
    assert path.read_bytes() == b"first"
    assert [child.name for child in path.parent.iterdir()] == ["file"]


def test_states_are_named_by_their_content(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    state = {"b": torch.ones(2), "a": torch.zeros(3)}
    refs = files.write_state(state, "input")
    assert refs == files.write_state(dict(reversed(state.items())), "input")
    assert refs.server is None
    blob = refs.device
    assert files.state(blob.sha256).stat().st_size == blob.nbytes
    assert {name: t.tolist() for name, t in read_tensors(files.state(blob.sha256)).items()} == {
        "a": [0, 0, 0],
        "b": [1, 1],
    }


def test_prompts_at_the_cut_have_a_separate_file(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    state = {"prompts": torch.ones(1, 2, 3), "tail.a": torch.zeros(3)}
    refs = files.write_state(state, "cut")
    assert refs.server is not None
    assert set(read_tensors(files.state(refs.device.sha256))) == {"tail.a"}
    assert torch.equal(read_prompts(files.server_state(refs.server.sha256)), state["prompts"])
    whole = files.read_state(refs)
    assert set(whole) == set(state)
    assert all(torch.equal(whole[name], state[name]) for name in state)
    assert set(files.read_state(files.write_state(state, "input"))) == set(state)
    assert files.write_state({"tail.a": torch.zeros(3)}, "cut").server is None


def test_a_folder_serves_one_server(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    refused = pytest.raises(InvalidField, match="another server")
    with lock_data_dir(folder), refused, lock_data_dir(folder):
        pass
    with lock_data_dir(folder):
        pass
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InvalidField, match="cannot be created"), lock_data_dir(blocked):
        pass


def test_bytes_before_the_first_credential_are_charged_to_its_participant() -> None:
    meter, counter = Meter(), SocketCounter(received=10, sent=20)
    counter.defer("/v1/runs/r1")
    counter.received, counter.sent = 1, 2
    meter.charge(counter, "r1", "p1", "/v1/runs/r1/head")
    meter.charge(counter, "r1", "p1", "/v1/runs/r1/head")
    expected = Traffic()
    expected.add("/v1/runs/r1", 10, 20)
    expected.add("/v1/runs/r1/head", 1, 2)
    assert meter.participant("r1", "p1").to_dict() == expected.to_dict()
    assert meter.run("r2").total() == 0
