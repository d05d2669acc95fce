"""Everything that is measured, started once and then idle until its turn comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfprompt_bench.engine.baselines import Limit
from sfprompt_bench.engine.processes import HOST, Cores, OpenRun, ServerProcess, Worker, hosted
from sfprompt_bench.engine.workload import EngineSetting, Load, shape_of


@dataclass(frozen=True)
class Served:
    """What a server did under a load."""

    samples_per_s: float
    server_cpu_s: float
    clients_cpu_s: float
    seconds: float
    waits: int  # answers "busy"
    lost: int  # steps whose forward had to be sent again
    samples: int

    @property
    def client_share(self) -> float:
        """CPU of all clients together, of one core: near 1, they and not the server were slow."""
        return self.clients_cpu_s / self.seconds


@dataclass(frozen=True)
class Looped:
    """What the plain loop did."""

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
    crowd: Worker
    loop: Worker
    limit: Limit  # of the device, for this body

    def serve(
        self, load: Load, steps: int, other: tuple[ServerProcess, OpenRun] | None = None
    ) -> Served:
        """Let the clients of a load do so many steps each; on another server where one is given."""
        server, run = other or (self.server, self.run)
        before = server.cpu_s()
        found = self.crowd.ask("work", **work_of(server, run, load), steps=steps)
        samples = load.samples * steps
        return Served(
            samples_per_s=samples / found["seconds"],
            server_cpu_s=server.cpu_s() - before,
            clients_cpu_s=found["cpu_s"],
            seconds=found["seconds"],
            waits=sum(one["waits"] for one in found["devices"]),
            lost=sum(one["lost"] for one in found["devices"]),
            samples=samples,
        )

    def loop_over(self, batch: int, steps: int) -> Looped:
        """Let the plain loop do so many steps."""
        found = self.loop.ask("run", batch=batch, steps=steps)
        samples = batch * steps
        return Looped(samples / found["seconds"], found["cpu_s"], samples)


def work_of(server: ServerProcess, run: OpenRun, load: Load) -> dict[str, Any]:
    """What `sfprompt_bench.engine.clients.work` is to be told."""
    return {
        "host": HOST,
        "port": server.port,
        "credentials": run.credentials[: load.clients],
        "shape": shape_of(run.settings.model, load.batch),
        "round_": run.round,
    }


@contextmanager
def stand(setting: EngineSetting, folder: Path, cores: Cores) -> Iterator[Testbed]:
    """Start it all, and stop it at the end of the block.

    Raises:
        SFPromptError: a process does not start, or refuses the setting.
    """
    with ExitStack() as stack:
        loop = Worker(
            "loop", "sfprompt_bench.engine.baselines", folder, cores.server, cores.threads
        )
        stack.callback(loop.stop)
        crowd = Worker("clients", "sfprompt_bench.engine.clients", folder, cores.clients, 1)
        stack.callback(crowd.stop)
        server = stack.enter_context(hosted("server", folder, cores, setting.place))
        run = server.open_run(setting.run)
        limit = loop.ask(
            "build",
            model=json.loads(setting.model.model_dump_json()),
            backbones=str(server.data_dir / "backbones"),
            place=setting.place,
            threads=cores.threads,
        )
        yield Testbed(
            setting=setting,
            folder=folder,
            cores=cores,
            server=server,
            run=run,
            crowd=crowd,
            loop=loop,
            limit=Limit(**limit),
        )
