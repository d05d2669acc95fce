"""Fuzzing of requests: a real server refuses them all, and then serves a device."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sfprompt_bench.fuzz import requests as fuzzed
from sfprompt_bench.fuzz.afterwards import check_finished, check_log, create_run, device_arguments
from sfprompt_bench.fuzz.findings import Report
from sfprompt_bench.fuzz.requests import fuzz_requests
from sfprompt_bench.fuzz.target import SERVER_SETTINGS, Target
from sfprompt_bench.fuzz.wire import RawConnection
from sfprompt_bench.run.preflight import choose_port
from sfprompt_bench.run.processes import wait_until_healthy
from split_server.client import OperatorClient, read_token
from tests.support.processes import CommandProcess


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder, port = tmp_path_factory.mktemp("server"), choose_port(0)
    values = {**SERVER_SETTINGS, "port": port, "data_dir": str(folder / "data"), "torch_threads": 1}
    config = folder / "server.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    arguments = ["serve", "--config", str(config)]
    process = CommandProcess("split_server.cli", arguments, folder / "server.log")
    try:
        url = f"http://127.0.0.1:{port}"
        probe = OperatorClient(url)
        wait_until_healthy(process, probe.is_healthy, 60)  # type: ignore[arg-type]
        probe.close()
        yield Target(url, read_token(folder / "data"), process.pid)
        report = Report("", "")
        check_log(process.log, report)
        assert report.findings == []
    finally:
        process.stop()


def test_a_server_refuses_hundreds_of_broken_requests_and_then_serves_a_device(
    target: Target, tmp_path: Path
) -> None:
    done: list[int] = []
    report = fuzz_requests(target, 600, 0, done.append, giants=False)
    arguments = device_arguments(target, create_run(target), tmp_path / "home")
    device = CommandProcess("edge_client.cli", arguments, tmp_path / "device.log")
    check_finished(device.wait(60), report)
    assert report.findings == [], "\n".join(report.lines())
    assert done[-1] == 600
    assert report.outcomes["200"] > 20, "some requests are still valid"
    codes = {outcome.split()[-1] for outcome in report.outcomes}
    assert {"malformed_frame", "invalid_field", "not_found", "unauthorized"} <= codes


def test_a_failure_is_a_finding_with_its_seed(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzed, "_REQUEST_S", 0.0)
    report = fuzz_requests(target, 3, 42, lambda _: None, giants=False)
    assert {finding.seed for finding in report.findings} <= {42, 43, 44}
    assert report.findings
    assert report.to_json()["findings"]


def test_a_start_waits_for_others_no_longer_than_the_longest_long_poll(target: Target) -> None:
    """It held a request back for 20 s, whatever `max_wait_s` was."""
    credential = target.runs[-1].credentials[0]
    own = [each for each in target.valid_requests() if credential in str(each.headers)]
    for kind, status in (("samples", 200), ("start", 503)):
        request = next(each for each in own if each.path == f"/v1/split/{kind}")
        began = time.monotonic()
        with closing(RawConnection(target.address, 10)) as connection:
            connection.send(request.to_bytes())
            assert connection.response().status == status
        assert time.monotonic() - began < 5
