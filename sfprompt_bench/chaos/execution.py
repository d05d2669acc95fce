"""One run of real processes under its faults, and what came of it."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.errors import Conflict, SFPromptError
from sfprompt_bench.chaos.disk import SmallDisks, empty, fill
from sfprompt_bench.chaos.faults import (
    MAY_END_A_DEVICE,
    MAY_END_THE_SERVER,
    NETWORK,
    SERVER,
    Fault,
    Kind,
)
from sfprompt_bench.chaos.outcome import Outcome, read_outcome
from sfprompt_bench.chaos.processes import ChaosProcess, Supervisor
from sfprompt_bench.chaos.proxy import Proxy
from sfprompt_bench.chaos.scenarios import DEVICES, TEST, TRAIN, settings_of
from sfprompt_bench.run.preflight import choose_port
from split_server.client import OperatorClient, read_token

_PORTS = (20_000, 32_000)  # below those that the system gives to outgoing connections

# Each run takes another.
_ports = itertools.cycle(random.sample(range(*_PORTS), 1000))

_TICK_S = 0.02

_START_S = 60.0

_PAUSE_S = {"server": 0.1, "device": 0.2}  # of the supervisors

_MAX_STARTS = 25

_BLAME_S = 15.0  # a process that ends with an error later than this was not ended by the fault

_DISK_MIB = 48

_SPARE_BYTES = 8192  # of a full disk, at most

_ROUND_EVENTS = ("begun-anew", "declined", "left-behind")


@dataclass
class RunResult:
    """A run under faults.

    Attributes:
        seed: of its faults.
        form: of the method.
        faults: with what followed each.
        requests: by route.
        seconds: from the start of the server to the end of the last device.
        problems: differences from the undisturbed run, and other failures.
        outcome: None: it could not be read.
        device_ended: a device ended with an error, which it tells the server: no evaluation waits
            for it.
    """

    seed: int
    form: str
    faults: list[Fault]
    requests: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    outcome: Outcome | None = None
    device_ended: bool = False

    @property
    def injected(self) -> list[Fault]:
        """The faults that were reached."""
        return [fault for fault in self.faults if fault.injected_at is not None]


class ChaosRun:
    """Executes one run: server, proxy and devices, and the faults at their requests.

    Args:
        form: of the method.
        seed: names the run.
        faults: to inject.
        folder: for logs, homes and data; new.
        backbones: prepared ones of an earlier run; None: the server prepares them.
        timeout_s: for the whole run.
        small_disks: keep data on small file systems.
    """

    def __init__(
        self,
        form: str,
        seed: int,
        faults: Sequence[Fault],
        folder: Path,
        backbones: Path | None = None,
        timeout_s: float = 180.0,
        *,
        small_disks: bool = False,
    ) -> None:
        folder.mkdir(parents=True)
        self.result = RunResult(seed, form, list(faults))
        self._folder = folder
        self._backbones = backbones
        self._timeout_s = timeout_s
        self._disks = SmallDisks(folder, _DISK_MIB) if small_disks else None
        self._namespace = self._disks.namespace if self._disks else None
        self._data_dir = (self._disks.server if self._disks else folder) / "server"
        self._homes = (self._disks.devices if self._disks else folder) / "homes"
        self._started = time.monotonic()
        self._newest: dict[str, Fault] = {}  # by the process that it touches
        self._armed: dict[str, Fault] = {}
        self._stopped: set[str] = set()
        self._joined: set[str] = set()
        self._processes: dict[str, ChaosProcess] = {}
        self._over = False

    @property
    def data_dir(self) -> Path:
        """The server's data folder, as this process reaches it."""
        return self._disks.outside(self._data_dir) if self._disks else self._data_dir

    def execute(self) -> RunResult:
        """Run to the end, and read the outcome; problems are in the result, not raised."""
        result = self.result
        try:
            self._run()
        except (SFPromptError, OSError) as error:
            result.problems.append(str(error))
        finally:
            result.seconds = time.monotonic() - self._started
            self._over = True
            for process in self._processes.values():
                if process.starts:
                    process.signal(signal.SIGKILL)
                    process.wait(10)
            if self._disks is not None:
                self._disks.close()
        return result

    def _run(self) -> None:
        port = _free_port()
        if self._backbones is not None:
            shutil.copytree(self._backbones, self.data_dir / "backbones")
        server = self._processes[SERVER] = ChaosProcess(
            SERVER,
            "split_server.cli",
            _server_arguments(port, self._data_dir),
            self._folder,
            namespace=self._namespace,
        )
        supervisors = [self._supervise(server, _PAUSE_S["server"])]
        server.start()
        run = _create_run(port, self.data_dir, self.result.form, server)
        proxy = self._proxy = Proxy(port, self.result.faults, self)
        try:
            for number in range(1, DEVICES + 1):
                device = self._add_device(number, run, proxy)
                supervisors.append(self._supervise(device, _PAUSE_S["device"]))
                device.start()
                # One after the other, so that devices join in the same order in every run.
                self._poll_until(supervisors, lambda name=device.name: name in self._joined)
            self._poll_until(supervisors, lambda: all(each.done for each in supervisors[1:]))
        finally:
            proxy.close()
            self.result.requests = dict(proxy.counts)
            self._over = True
            server.signal(signal.SIGKILL)
            server.wait(10)
            with contextlib.suppress(SFPromptError, OSError):
                self.result.outcome = read_outcome(self._copy_database(), run)

    def _copy_database(self) -> Path:
        """Copy the database out of a small disk, which ends with the run."""
        copy = self._folder / "end"
        copy.mkdir(exist_ok=True)
        for file in self.data_dir.glob("server.sqlite*"):
            shutil.copyfile(file, copy / file.name)
        return copy

    def _add_device(self, number: int, run: str, proxy: Proxy) -> ChaosProcess:
        name = f"device-{number}"
        arguments = ["join", f"http://127.0.0.1:{proxy.listen(name)}", "--run", run]
        arguments += ["--data", "digits", "--part", f"{number}/{DEVICES}", "--threads", "1"]
        arguments += ["--limit-train", str(TRAIN), "--limit-test", str(TEST)]
        arguments += ["--home", str(self._homes / name), "--name", name, "--progress", "json"]

        def on_event(event: dict[str, Any]) -> None:
            if event.get("event") == "joined":
                self._joined.add(name)
            elif event.get("event") in _ROUND_EVENTS and (fault := self._cause(name)):
                fault.rounds += 1

        process = ChaosProcess(
            name, "edge_client.cli", arguments, self._folder, on_event, self._namespace
        )
        self._processes[name] = process
        return process

    def _poll_until(self, supervisors: Sequence[Supervisor], is_reached: Any) -> None:
        while not is_reached():
            for supervisor in supervisors:
                supervisor.poll()
                if supervisor.gave_up:
                    name = supervisor.process.name
                    raise SFPromptError(
                        f"{name} was started {_MAX_STARTS} times:\n"
                        + supervisor.process.last_lines(5)
                    )
            if time.monotonic() > self._started + self._timeout_s:
                raise SFPromptError(f"the run did not end within {self._timeout_s:g} s")
            time.sleep(_TICK_S)

    def _supervise(self, process: ChaosProcess, pause_s: float) -> Supervisor:
        return Supervisor(process, pause_s, _MAX_STARTS, self._ended)

    def _ended(self, process: ChaosProcess, code: int) -> None:
        """Credit the end of a process to a fault, or note it as a problem."""
        if self._over:
            return
        name = process.name
        armed = self._armed.pop(name, None)
        stopped = name in self._stopped
        self._stopped.discard(name)
        if code == -signal.SIGKILL or (stopped and code == -signal.SIGTERM):
            if armed is not None and process.page.has_fired():
                self._touch(armed, name)
            if (fault := self._newest.get(name)) is not None:
                fault.restarts += 1
            return
        allowed = MAY_END_THE_SERVER if name == SERVER else MAY_END_A_DEVICE
        self.result.device_ended |= name != SERVER
        since = time.monotonic() - self._started - _BLAME_S
        causes = [
            fault
            for fault in self.result.injected
            if fault.kind in allowed and name in fault.target and (fault.injected_at or 0.0) > since
        ]
        if causes:
            max(causes, key=lambda fault: fault.injected_at or 0.0).restarts += 1
        else:
            self.result.problems.append(
                f"{name} ended with exit code {code}: {process.last_lines(2)}"
            )

    def _touch(self, fault: Fault, *names: str) -> None:
        fault.injected_at = time.monotonic() - self._started
        fault.target = ", ".join(names)
        for name in names:
            self._newest[name] = fault

    def _cause(self, device: str) -> Fault | None:
        """Return the newest fault that touched this device or the server."""
        touching = [self._newest[name] for name in (device, SERVER) if name in self._newest]
        return max(touching, key=lambda fault: fault.injected_at or 0.0, default=None)

    # Called by the proxy, in its loop

    def retried(self, fault: Fault | None, device: str) -> None:
        if (cause := fault or self._cause(device)) is not None:
            cause.retries += 1

    def refused(self, fault: Fault | None, device: str, status: int) -> None:
        if (cause := fault or self._cause(device)) is not None:
            cause.errors += 1

    def inject(self, fault: Fault, device: str) -> None:
        kind = fault.kind
        if kind in NETWORK:
            self._touch(fault, device)
        elif kind is Kind.OUTAGE:
            self._touch(fault, device)
            self._proxy.outage(device, fault.seconds)
        elif kind in (Kind.KILL_SERVER_WRITING, Kind.KILL_DEVICE_WRITING):
            name = SERVER if kind is Kind.KILL_SERVER_WRITING else device
            if name not in self._armed:
                self._armed[name] = fault
                self._processes[name].page.arm(fault.point, fault.calls)
        elif kind in (Kind.KILL_SERVER, Kind.KILL_DEVICE, Kind.STOP_SERVER):
            name = device if kind is Kind.KILL_DEVICE else SERVER
            number = signal.SIGTERM if kind is Kind.STOP_SERVER else signal.SIGKILL
            self._later(fault.seconds, lambda: self._end(fault, name, number))
        elif kind in (Kind.FREEZE_SERVER, Kind.FREEZE_DEVICE):
            self._freeze(fault, SERVER if kind is Kind.FREEZE_SERVER else device)
        elif kind in (Kind.CLOCK_SERVER, Kind.CLOCK_DEVICE):
            name = SERVER if kind is Kind.CLOCK_SERVER else device
            self._touch(fault, name)
            self._processes[name].page.set_clock(fault.jump_s)
        elif kind is Kind.WRITE_ERRORS:
            self._touch(fault, SERVER)
            server = self._processes[SERVER]
            server.limit_files(fault.draw % 65_536)
            self._later(fault.seconds, lambda: server.limit_files(None))
        else:
            self._fill_disk(fault)

    def _end(self, fault: Fault, name: str, number: int) -> None:
        process = self._processes[name]
        if process.is_alive:
            self._touch(fault, name)
            if number == signal.SIGTERM:
                self._stopped.add(name)
            process.signal(number)

    def _freeze(self, fault: Fault, name: str) -> None:
        process = self._processes[name]
        self._touch(fault, name)
        process.signal(signal.SIGSTOP)
        self._later(fault.seconds, lambda: process.signal(signal.SIGCONT))

    def _fill_disk(self, fault: Fault) -> None:
        if self._disks is None:
            return
        of_server = fault.kind is Kind.FULL_DISK_SERVER
        names = [SERVER] if of_server else [name for name in self._processes if name != SERVER]
        disk = self._disks.outside(self._disks.server if of_server else self._disks.devices)
        self._touch(fault, *names)
        fill(disk, fault.draw % _SPARE_BYTES)
        self._later(fault.seconds, lambda: empty(disk))

    def _later(self, seconds: float, action: Any) -> None:
        self._proxy.loop.call_later(seconds, action)


def _server_arguments(port: int, data_dir: Path) -> list[str]:
    return [
        *("serve", "--port", str(port), "--data-dir", str(data_dir), "--torch-threads", "1"),
        # The rows that share a batch may change how a matrix product is rounded.
        *("--max-batch-samples", "1"),
        *("--stall-timeout-s", "2", "--body-timeout-s", "5"),
    ]


def _free_port() -> int:
    """Choose a port that no other run of this process has: it stays free while a server is dead."""
    for _ in range(100):
        with contextlib.suppress(Conflict):
            return choose_port(next(_ports))
    return choose_port(0)


def _create_run(port: int, data_dir: Path, form: str, server: ChaosProcess) -> str:
    """Wait for the server and create the run; no fault is injected before it exists."""
    url = f"http://127.0.0.1:{port}"
    with contextlib.closing(OperatorClient(url)) as probe:
        deadline = time.monotonic() + _START_S
        while not probe.is_healthy():
            if server.exit_code() is not None or time.monotonic() > deadline:
                raise SFPromptError(f"the server does not start:\n{server.last_lines()}")
            time.sleep(_TICK_S)
    with contextlib.closing(OperatorClient(url, read_token(data_dir))) as operator:
        return operator.create_run(settings_of(form)).id
