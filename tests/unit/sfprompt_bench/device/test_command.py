"""`sfprompt-bench device` measures both libraries, each in a process of its own."""

import json
from pathlib import Path

from sfprompt_bench.device.command import device


def test_both_libraries_are_measured_and_numpy_takes_less_memory(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    device("test_vit", "32", cut=1, seconds=0.1, json_file=file)
    rows = {row["kind"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {"numpy", "torch"}
    for row in rows.values():
        assert [figures["batch"] for figures in row["batches"]] == [1, 16]
        assert all(figures["samples_per_s"] > 0 for figures in row["batches"])
    assert rows["numpy"]["peak_mb"] < 0.6 * rows["torch"]["peak_mb"]
