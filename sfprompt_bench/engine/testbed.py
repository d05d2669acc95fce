"""The measured processes: started together, and idle until their turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfprompt_bench.engine.loop import Roofline
from sfprompt_bench.engine.server import HOST, OpenRun, ServerProcess, running_server
from sfprompt_bench.engine.worker import Cores, Worker
from sfprompt_bench.engine.workload import EngineSetting, Load, shape_of


@dataclass(frozen=True)
class Served:
    """One measurement of a server under a load."""

    samples_per_s: float
    server_cpu_s: float
    clients_cpu_s: float
    seconds: float
    waits: int  # ``busy`` responses
    lost: int  # steps whose forward had to be repeated
    samples: int

    @property
    def client_share(self) -> float:
        """CPU of all clients together, of one core: near 1, the clients limited the rate."""
        return self.clients_cpu_s / self.seconds


@dataclass(frozen=True)
class Looped:
    """One measurement of the plain loop."""

    samples_per_s: float
    cpu_s: float
    samples: int

    @property
    def seconds(self) -> float:
        return self.samples / self.samples_per_s


@dataclass
class Testbed:
    """A server with an open run, the clients' process and the loop's, each on its cores."""

    setting: EngineSetting
    folder: Path
    cores: Cores
    server: ServerProcess
    run: OpenRun
    clients: Worker
    loop: Worker
    roofline: Roofline

    def measure_server(
        self, load: Load, steps: int, other: tuple[ServerProcess, OpenRun] | None = None
    ) -> Served:
        """Run ``steps`` steps of each client of a load, on another server if one is given."""
        server, run = other or (self.server, self.run)
        before = server.cpu_s()
        result = self.clients.perform("run_steps", **step_arguments(server, run, load), steps=steps)
        samples = load.samples * steps
        return Served(
            samples_per_s=samples / result["seconds"],
            server_cpu_s=server.cpu_s() - before,
            clients_cpu_s=result["cpu_s"],
            seconds=result["seconds"],
            waits=sum(device["waits"] for device in result["devices"]),
            lost=sum(device["lost"] for device in result["devices"]),
            samples=samples,
        )

    def measure_loop(self, batch: int, steps: int) -> Looped:
        """Run ``steps`` steps of the plain loop."""
        result = self.loop.perform("run", batch=batch, steps=steps)
        samples = batch * steps
        return Looped(samples / result["seconds"], result["cpu_s"], samples)


def step_arguments(server: ServerProcess, run: OpenRun, load: Load) -> dict[str, Any]:
    """Arguments of `sfprompt_bench.engine.clients.run_steps` for a load."""
    return {
        "host": HOST,
        "port": server.port,
        "credentials": run.credentials[: load.clients],
        "shape": shape_of(run.settings.model, load.batch),
        "round_": run.round,
    }


@contextmanager
def running_testbed(setting: EngineSetting, folder: Path, cores: Cores) -> Iterator[Testbed]:
    """Start all processes, and stop them at the end of the block.

    Raises:
        SFPromptError: a process does not start, or refuses the setting.
    """
    with ExitStack() as stack:
        loop = Worker("loop", "sfprompt_bench.engine.loop", folder, cores.server, cores.threads)
        stack.callback(loop.stop)
        clients = Worker("clients", "sfprompt_bench.engine.clients", folder, cores.clients, 1)
        stack.callback(clients.stop)
        server = stack.enter_context(running_server("server", folder, cores, setting.placement))
        run = server.open_run(setting.run)
        roofline = loop.perform(
            "build",
            model=json.loads(setting.model.model_dump_json()),
            backbones=str(server.data_dir / "backbones"),
            placement=setting.placement,
            threads=cores.threads,
        )
        yield Testbed(
            setting=setting,
            folder=folder,
            cores=cores,
            server=server,
            run=run,
            clients=clients,
            loop=loop,
            roofline=Roofline(**roofline),
        )
