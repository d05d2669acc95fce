"""The engine's benchmark: arithmetic, division of cores, tables, plots and files."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from protocol.errors import InvalidField, SFPromptError
from sfprompt_bench.engine.findings import Findings, meets_target, plot_curve, plot_soak
from sfprompt_bench.engine.loop import Roofline, measure_roofline
from sfprompt_bench.engine.roundtrip import REST, RoundTrip, Trips
from sfprompt_bench.engine.soak import Soak
from sfprompt_bench.engine.synthetic_device import read_head
from sfprompt_bench.engine.tables import ratio_table, roundtrip_table
from sfprompt_bench.engine.testbed import Looped, Served
from sfprompt_bench.engine.throughput import Point, Throughput, curve_loads, steps_for, write_csv
from sfprompt_bench.engine.worker import Cores, Worker, divide, pinned_to
from sfprompt_bench.engine.workload import QUICK, EngineSetting, Load, Plan, Spread, quantile
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.parts.build import build_body
from split_server.runtime.device import choose_placement
from tests.support.federation import SPLIT, smashed

CPU = Roofline("cpu", "float32", flops_per_s=1e11, sample_flops=10**8)


def served(rate: float, samples: int = 100, cpu_s: float = 2.0) -> Served:
    return Served(
        samples_per_s=rate,
        server_cpu_s=cpu_s,
        clients_cpu_s=0.1,
        seconds=samples / rate,
        waits=1,
        lost=0,
        samples=samples,
    )


def throughput(load: Load, ratio: float) -> Throughput:
    """The loop does 100 samples a second, the server as many as the ratio says."""
    looped = [Looped(100.0, 1.0, 100)] * 3
    return Throughput(load, 2, [served(100 * ratio)] * 2, looped, Looped(90.0, 1.1, 100))


def soak(ends: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]]) -> Soak:
    memory = [(0.0, 10), (2.0, 100), (4.0, 104), (6.0, 100)]
    return Soak(Load(2, 1), 6.0, memory, ends, lengths, 1.0, 0, 0, 0.01)


def findings(curve: Sequence[Point] | None = None) -> Findings:
    loads = [Load(8, 16), Load(8, 32), Load(1, 32)]
    trips = Trips((0.004, 0.004, 0.004), 0.003, 0.006)
    echo = Trips((0.002, 0.002, 0.002), 0.0015, 0.0015)
    return Findings(
        EngineSetting(),
        Cores((0,), (1,)),
        CPU,
        [throughput(load, 0.93) for load in loads],
        RoundTrip(1_000_000, [trips], [echo], {"forward": 0.004}, {"client encode": 0.1}),
        curve,
        soak([[2.0, 3.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]),
    )


def test_the_share_of_the_matrix_rate_is_that_of_its_operations() -> None:
    assert CPU.share(200.0) == pytest.approx(0.2)  # 2e10 of 1e11
    assert findings().to_json()["throughput"][0]["share_of_matrix_rate"] == pytest.approx(0.093)


def test_a_roofline_counts_a_samples_forward_and_input_gradient(tmp_path: Path) -> None:
    file = prepare_backbone(SPLIT, "random:0", tmp_path).path
    body = build_body(SPLIT, open_backbone(file))
    _, tokens, width = smashed().shape
    roofline = measure_roofline(body, choose_placement("cpu", "float32"), tokens)
    # Of a block: twelve D x D products of two operations a token, once forward and once for the
    # gradient; two products of attention forward, and four for their gradients.
    linear, attention = 2 * 12 * 2 * tokens * width**2, 6 * 2 * tokens**2 * width
    assert roofline.sample_flops == len(list(body.blocks)) * (linear + attention)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300, unique=True))
def test_server_and_clients_share_no_core_where_there_are_two(usable: list[int]) -> None:
    cores = divide(usable, pinned=True)
    assert cores.server
    assert cores.clients
    assert cores.threads == len(cores.server)
    assert cores.shared == (len(usable) == 1)
    if len(usable) > 1:
        assert sorted(cores.server + cores.clients) == sorted(usable)


def test_unpinned_processes_count_as_sharing() -> None:
    assert divide([0, 1], pinned=False).shared


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="processes cannot be pinned on this machine"
)
def test_a_block_pins_to_its_cores_and_restores_those_before() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    with pinned_to([one]):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == before


def test_quantiles_are_by_nearest_rank() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert quantile([7.0], 0.99) == 7.0


def test_a_spread_has_median_minimum_and_maximum() -> None:
    assert Spread.of([3.0, 1.0, 2.0]).to_json() == {"median": 2, "least": 1, "most": 3, "n": 3}


def test_the_servers_rate_is_held_against_the_loops_before_and_after_it() -> None:
    looped = [Looped(100.0, 1.0, 100), Looped(50.0, 2.0, 100), Looped(150.0, 1.5, 100)]
    result = Throughput(Load(1, 1), 2, [served(75.0), served(50.0)], looped, looped[0])
    assert result.ratio.values == (1.0, 0.5)
    # 4.5 s for 300 samples of the loop, 4 s for 200 of the server.
    assert result.cpu_ratio == pytest.approx((4.5 / 300) / (4.0 / 200))


def test_steps_fill_the_time_but_are_two_at_least() -> None:
    assert steps_for(Load(8, 16), samples_per_s=256.0, seconds=10.0) == 20
    assert steps_for(Load(8, 16), samples_per_s=1.0, seconds=1.0) == 2


def test_a_soak_counts_the_slowest_client_against_the_fastest() -> None:
    measured = soak([[0.5, 2.0, 3.0, 4.0], [2.0, 4.0]], [[0.5, 1.5, 1.0, 1.0], [2.0, 2.0]])
    assert measured.fairness == 0.5
    assert sorted(measured.settled) == [1.0, 1.0, 1.5, 2.0, 2.0]  # without the warm-up's
    assert measured.p99_vs_median == pytest.approx(2.0 / 1.5)
    assert measured.memory_drift == pytest.approx(0.04)  # 104 against 100; 10 was the warm-up


def test_the_cpu_of_a_round_trip_is_per_megabyte_and_the_sum_of_its_parts() -> None:
    trip = findings().roundtrip
    # Three round trips of 1 MB each way: 6 MB, 3 ms of the client and 6 ms of the server.
    assert trip.cpu["client"] == pytest.approx(0.5)
    assert trip.cpu["server"] == pytest.approx(1.0)
    assert sum(trip.budget.values()) == pytest.approx(2 * 1.5)
    assert trip.budget[REST] == pytest.approx(3.0 - 0.1 - 1.0)
    assert trip.ratio.median == pytest.approx(2.0)


def test_what_other_programs_took_is_what_the_loop_lacks_of_its_cores() -> None:
    assert findings().taken == pytest.approx(0.0)
    busy = Throughput(Load(1, 1), 2, [served(1.0)], [Looped(50.0, 1.5, 100)] * 2, Looped(1, 1, 1))
    assert replace(findings(), throughput=[busy]).taken == pytest.approx(0.25)  # 1.5 s of 2
    assert replace(findings(), roofline=replace(CPU, device="cuda")).taken is None


def test_a_round_trips_cpu_is_held_against_the_echos() -> None:
    assert findings().roundtrip.cpu_ratio == pytest.approx(9.0 / 3.0)


def test_the_ratios_have_stable_names() -> None:
    result = findings().to_json()
    assert result["ratios"] == pytest.approx(
        {
            "throughput_vs_loop_8x16": 0.93,
            "throughput_vs_loop_8x32": 0.93,
            "throughput_vs_loop_1x32": 0.93,
            "roundtrip_vs_socket": 2.0,
            "fairness": 1.0,
            "p99_vs_median": 1.0,
        }
    )


def test_targets_are_bounds_from_below_or_from_above() -> None:
    assert meets_target("throughput_vs_loop_8x32", 0.95)
    assert not meets_target("throughput_vs_loop_8x32", 0.94)
    assert meets_target("roundtrip_vs_socket", 2.5)
    assert not meets_target("roundtrip_vs_socket", 2.6)
    assert meets_target("a figure without a target", 0.0)


def test_the_table_shows_each_ratio_and_its_target() -> None:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    result = findings()
    console.print(ratio_table(result))
    console.print(roundtrip_table(result.roundtrip))
    console.file.close()
    text = console.export_text()
    for name in result.ratios:
        assert name in text
    assert "≥ 0.95" in text
    assert "≤ 2.5" in text


def test_the_curve_leaves_out_what_is_too_large_and_begins_with_the_small() -> None:
    plan = Plan(curve_clients=(64, 1), curve_batches=(32, 1), curve_samples=64)
    assert curve_loads(plan) == [Load(1, 1), Load(1, 32), Load(64, 1)]


def test_the_full_curve_has_all_its_corners() -> None:
    points = curve_loads(Plan())
    assert {Load(1, 1), Load(1, 32), Load(64, 1), Load(64, 32)} <= set(points)


def test_the_curves_data_and_the_plots_are_written(tmp_path: Path) -> None:
    points = [
        Point(Load(clients, 1), [served(20.0 * clients)] * 2, [served(10.0)] * 2)
        for clients in (1, 2)
    ]
    with write_csv(points, tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["clients"], row["batch"], float(row["gain"])) for row in rows] == [
        ("1", "1", 2.0),
        ("2", "1", 4.0),
    ]
    assert plot_curve(points, tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert plot_soak(findings().soak, tmp_path / "soak.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_allows_all_clients_and_batches_of_its_plan() -> None:
    setting = EngineSetting(plan=QUICK)
    assert setting.run.federation.min_participants == 64
    assert setting.run.training.batch_size >= max(load.batch for load in QUICK.loads)
    assert setting.run.model.prompt_at == "input"


def test_the_round_trips_tensor_has_one_and_a_half_megabytes_and_an_empty_body() -> None:
    setting = EngineSetting()
    batch, tokens, width = setting.roundtrip_shape
    assert 4 * batch * tokens * width == pytest.approx(1.5e6, rel=0.01)
    assert setting.empty_model.cut == 12
    assert setting.empty_run.training.batch_size == batch


def test_a_cut_after_the_last_block_is_refused() -> None:
    with pytest.raises(InvalidField, match="cut"):
        _ = EngineSetting(cut=13).roundtrip_shape


def test_the_head_of_a_response_is_parsed() -> None:
    head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 12\r\nretry-after: 1"
    assert read_head(head) == (503, 12)


def test_a_worker_reports_a_failed_task_and_goes_on(tmp_path: Path) -> None:
    worker = Worker("echo", "sfprompt_bench.engine.echo", tmp_path, [0], 1)
    try:
        with pytest.raises(SFPromptError, match="TypeError"):
            worker.perform("cpu_seconds", nonsense=1)
        assert worker.perform("cpu_seconds")["cpu_s"] > 0
    finally:
        worker.stop()
