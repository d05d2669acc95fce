"""Tasks run once, several at a time, and start again after an interruption."""

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_client.data.errors import DataError, PartitionError
from protocol.errors import InvalidField, SFPromptError
from sfprompt_bench.compare.tasks import Figures, Task, perform_all, read_figures, task_key

FILE = "task.json"


def task(folder: Path, name: str, **of: Any) -> Task:
    return Task(name, folder / name, {"name": name, **of})


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def do(
    tasks: list[Task], perform: Any, at_once: int = 1, console: Console | None = None
) -> list[Figures | SFPromptError | DataError]:
    return perform_all(
        tasks,
        perform,
        file=FILE,
        at_once=at_once,
        console=console or quiet(),
        describe=lambda task, figures: f"{task.name} gave {figures['value']}",
    )


def test_tasks_return_their_figures_in_order(tmp_path: Path) -> None:
    tasks = [task(tmp_path, name) for name in ("a", "b", "c")]
    console = quiet()
    done = do(tasks, lambda task_: {"value": task_.name * 2}, at_once=2, console=console)
    assert done == [{"value": "aa"}, {"value": "bb"}, {"value": "cc"}]
    assert "b gave bb" in console.file.getvalue()  # type: ignore[attr-defined]
    record = json.loads((tmp_path / "b" / FILE).read_text())
    assert record == {"key": tasks[1].key, "of": {"name": "b"}, "figures": {"value": "bb"}}


def test_a_task_with_a_result_does_not_run_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def perform(task_: Task) -> Figures:
        calls.append(task_.name)
        return {"value": len(calls)}

    first = do([task(tmp_path, "a"), task(tmp_path, "b")], perform)
    again = do([task(tmp_path, "a"), task(tmp_path, "b")], perform)
    assert first == again
    assert calls == ["a", "b"]


def test_a_task_with_another_setting_is_another_task(tmp_path: Path) -> None:
    do([task(tmp_path, "a", rounds=1)], lambda task_: {"value": 1})
    assert do([task(tmp_path, "a", rounds=2)], lambda task_: {"value": 2}) == [{"value": 2}]


def test_an_interrupted_task_begins_in_an_empty_folder(tmp_path: Path) -> None:
    task_ = task(tmp_path, "a")
    task_.folder.mkdir()
    (task_.folder / "half").write_text("what an interrupted run left")

    def perform(given: Task) -> Figures:
        assert list(given.folder.iterdir()) == []
        return {"value": 1}

    assert do([task_], perform) == [{"value": 1}]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"of": {}, "figures": {}}', "\x00"])
def test_a_damaged_file_has_no_result(tmp_path: Path, text: str) -> None:
    task_ = task(tmp_path, "a")
    task_.folder.mkdir()
    (task_.folder / FILE).write_text(text)
    assert read_figures(task_, FILE) is None


def test_a_failure_is_reported_and_does_not_stop_other_tasks(tmp_path: Path) -> None:
    wrong = {
        "a": InvalidField("too many", field="devices"),
        "b": PartitionError("parts", limit=1, value=2),
    }

    def perform(task_: Task) -> Figures:
        if task_.name in wrong:
            raise wrong[task_.name]
        return {"value": 3}

    console = quiet()
    done = do([task(tmp_path, name) for name in "abc"], perform, console=console)
    assert done == [wrong["a"], wrong["b"], {"value": 3}]
    assert "too many; field: devices" in console.file.getvalue()  # type: ignore[attr-defined]
    assert read_figures(task(tmp_path, "a"), FILE) is None


def test_tasks_run_at_the_same_time(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=20)

    def perform(task_: Task) -> Figures:
        together.wait()  # passes only if three wait at the same time
        return {"value": 1}

    assert len(do([task(tmp_path, name) for name in "abc"], perform, at_once=3)) == 3


def test_an_interrupt_cancels_waiting_tasks(tmp_path: Path) -> None:
    begun: list[str] = []

    def perform(task_: Task) -> Figures:
        begun.append(task_.name)
        if task_.name == "a":
            raise KeyboardInterrupt
        time.sleep(0.2)  # long enough for the others to be called off
        return {"value": 1}

    with pytest.raises(KeyboardInterrupt):
        do([task(tmp_path, name) for name in "abcdefgh"], perform)
    assert len(begun) < 8


def test_a_key_depends_on_every_value_and_on_no_order() -> None:
    assert task_key({"a": 1, "b": [2]}) == task_key({"b": [2], "a": 1})
    assert len({task_key(of) for of in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {})}) == 5
