"""A run on this machine: a split server and devices as processes, over loopback."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from protocol.errors import SFPromptError
from protocol.messages import Results
from protocol.settings import RunSettings
from sfprompt_bench.run.live import LiveView
from sfprompt_bench.run.preflight import choose_port, shared_backbones
from sfprompt_bench.run.processes import Process, start_device, wait_until_healthy
from sfprompt_bench.run.report import summary
from split_server.client import OperatorClient, read_token

_START_TIMEOUT_S = 120.0

_POLL_S = 0.5

EVALUATION = "evaluation.json"  # of the best round, in the run's folder

SERVER = "server"  # the server's data folder, in the run's folder

_DEVICES = "devices"  # folder of the devices' homes

_LEAVE_TIMEOUT_S = 60.0  # for devices to learn that the run has ended and to leave


@dataclass(frozen=True)
class LocalRun:
    """A run's settings, data and devices.

    Args:
        settings: of the run.
        data: as in ``edge-client --data``.
        devices: number of edge clients.
        partition: of the data between them, as in ``edge-client --partition``.
        folder: for all files of the run; created if necessary.
        port: of the server; 0: any free port.
        server_threads: CPU threads of the body; None: all.
        dtype: of the body's computation, as in ``split-server serve --dtype``.
        limit_train, limit_test: images over all devices; None: all.
        shots: training images of each class over all devices, in place of limit_train; None: all.
        link: network to simulate between each device and the server, e.g. ``20mbit,50ms``.
    """

    settings: RunSettings
    data: str
    devices: int
    partition: str
    folder: Path
    port: int = 0
    server_threads: int | None = None
    dtype: str = "auto"
    limit_train: int | None = None
    limit_test: int | None = None
    link: str | None = None
    shots: int | None = None

    def execute(self, console: Console) -> tuple[Results, dict[str, Any]]:
        """Run to the end and return the server's results and their summary.

        Raises:
            SFPromptError: a process ended early (with the end of its log), or the run failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / _DEVICES, ignore_errors=True)  # of an earlier run
        names = [f"device-{number}" for number in range(1, self.devices + 1)]
        rounds = self.settings.federation.rounds
        with self._server(console) as (url, operator, server), ExitStack() as stack:
            console.print("preparing the backbone …")
            run = operator.create_run(self.settings)
            started = time.monotonic()
            view = stack.enter_context(LiveView(console, names, rounds))
            devices = [
                start_device(
                    name,
                    self._device_arguments(url, run.id, number),
                    self.folder,
                    view.show_event,
                    threads=1,
                )
                for number, name in enumerate(names, start=1)
            ]
            for device in devices:
                stack.callback(device.stop)
            while True:
                results = operator.results(run.id)
                view.show_rounds(results.rounds)
                if results.run.status.is_over:
                    break
                _check_alive(server, devices)
                time.sleep(_POLL_S)
            for device in devices:  # a device that still computes is stopped
                with suppress(subprocess.TimeoutExpired):
                    device.wait(_LEAVE_TIMEOUT_S)
            results = operator.results(run.id)  # with the bytes of the devices' last requests
            self._save_evaluation(operator, results)
        if results.run.status != "finished":
            ended = results.run
            reason = ended.reason or "the server gave no reason"
            raise SFPromptError(f"the run ended with status {ended.status}: {reason}")
        figures = summary(results, time.monotonic() - started)
        self._save_state(results)
        return results, figures

    @contextmanager
    def _server(self, console: Console) -> Iterator[tuple[str, OperatorClient, Process]]:
        port = choose_port(self.port)
        data_dir = self.folder / SERVER
        arguments = ["split_server.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--data-dir", str(data_dir)]
        if self.dtype != "auto":  # auto leaves the choice to the environment
            arguments += ["--dtype", self.dtype]
        if self.server_threads is not None:
            arguments += ["--torch-threads", str(self.server_threads)]
        url = f"http://127.0.0.1:{port}"
        console.print(f"starting the split server on {url} …")
        with shared_backbones(data_dir):
            yield from self._serving(arguments, url, data_dir)

    def _serving(
        self, arguments: list[str], url: str, data_dir: Path
    ) -> Iterator[tuple[str, OperatorClient, Process]]:
        server = Process("server", arguments, self.folder, threads=self.server_threads)
        try:
            probe = OperatorClient(url)
            wait_until_healthy(server, probe.is_healthy, _START_TIMEOUT_S)
            probe.close()
            operator = OperatorClient(url, read_token(data_dir))
            try:
                yield url, operator, server
            finally:
                operator.close()
        finally:
            server.stop()

    def _device_arguments(self, url: str, run: str, number: int) -> list[str]:
        arguments = ["join", url, "--run", run, "--data", self.data]
        arguments += ["--part", f"{number}/{self.devices}", "--partition", self.partition]
        arguments += ["--data-seed", str(self.settings.seed % 2**31), "--threads", "1"]
        if self.limit_train is not None:
            arguments += ["--limit-train", str(self.limit_train)]
        if self.limit_test is not None:
            arguments += ["--limit-test", str(self.limit_test)]
        if self.shots is not None:
            arguments += ["--shots", str(self.shots)]
        if self.settings.plan.shares_labels:
            arguments.append("--share-labels")
        if self.link is not None:
            arguments += ["--link", self.link]
        # Each device has a home and downloads its files, as on separate machines.
        home = self.folder / _DEVICES / str(number)
        return [*arguments, "--home", str(home)]

    def _save_evaluation(self, operator: OperatorClient, results: Results) -> None:
        if results.best is not None:
            view = operator.evaluation(results.run.id, results.best.round)
            (self.folder / EVALUATION).write_text(view.model_dump_json(indent=2) + "\n")

    def _save_state(self, results: Results) -> None:
        # Imported at the end: server and devices need not wait for this process to import torch.
        from split_model.checkpoints.state import save_state
        from split_server.federation.export import newest_state

        _, state = newest_state(self.folder / SERVER, results.run.id)
        save_state(state, self.folder / "tuned.safetensors")


def _check_alive(server: Process, devices: list[Process]) -> None:
    for process in (server, *devices):
        code = process.exit_code()
        if code or (code == 0 and process is server):
            raise SFPromptError(
                f"{process.name} ended early (exit code {code}):\n{process.last_lines()}",
                field=str(process.log),
                hint="read the whole log in that file",
            )
