"""The engine's benchmark with a real server, as small as possible."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from sfprompt_bench.engine.findings import write_findings
from sfprompt_bench.engine.measurement import measure_engine, show
from sfprompt_bench.engine.workload import EngineSetting, Load, Plan

TINY = Plan(
    loads=(Load(2, 2),),
    repetitions=1,
    seconds=0.1,
    roundtrip_repetitions=2,
    roundtrip_steps=2,
    curve_clients=(2,),
    curve_batches=(1,),
    curve_repetitions=1,
    curve_seconds=0.1,
    soak=Load(3, 1),
    soak_s=2.0,
)


def test_a_benchmark_measures_everything_and_writes_it_down(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    setting = EngineSetting(backbone="vit_tiny_patch16_224", image_size=32, cut=10, plan=TINY)
    findings = measure_engine(setting, tmp_path, console)
    show(findings, console)
    written = write_findings(findings, tmp_path)
    assert all(path.stat().st_size > 0 for path in written)
    figures = json.loads((tmp_path / "engine.json").read_text())
    assert set(figures["ratios"]) == {
        "throughput_vs_loop_2x2",
        "roundtrip_vs_socket",
        "fairness",
        "p99_vs_median",
    }
    assert all(value > 0 for value in figures["ratios"].values())
    assert [point["clients"] for point in figures["curve"]] == [2]
    assert figures["roundtrip"]["seconds"] > figures["roundtrip"]["echo_seconds"]
    assert figures["soak"]["steps_least"] >= 1
    assert "roundtrip_vs_socket" in console.file.getvalue()  # type: ignore[attr-defined]
