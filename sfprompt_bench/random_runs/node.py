"""A server in a thread of this process, and runs whose devices are threads too."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from edge_client.data.dataset import Dataset
from edge_client.participant import Participant
from edge_client.transport.client import Server as DeviceClient
from protocol.errors import SFPromptError
from protocol.messages import Results
from protocol.settings import RunSettings
from sfprompt_bench.run.preflight import shared_backbones
from split_server.app import build_server, create_app
from split_server.client import OperatorClient, read_token
from split_server.settings import load_settings

_START_TIMEOUT_S = 60.0

_RUN_TIMEOUT_S = 900.0

_STOP_TIMEOUT_S = 30.0


class Node:
    """A server at an address on loopback.

    Args:
        url: of the server.
        folder: of the server and the devices.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder

    def run(self, settings: RunSettings, data: Sequence[Dataset]) -> Results:
        """Run with a device for each data set.

        Raises:
            SFPromptError: a device failed, or the run.
        """
        operator = OperatorClient(self._url, read_token(self._folder / "server"))
        with closing(operator), ThreadPoolExecutor(len(data)) as threads:
            run = operator.create_run(settings).id
            devices = [
                threads.submit(self._take_part, run, f"device-{number}", part)
                for number, part in enumerate(data, start=1)
            ]
            done, waiting = wait(devices, _RUN_TIMEOUT_S, return_when=FIRST_EXCEPTION)
            failure = next((error for device in done if (error := device.exception())), None)
            if waiting and not operator.results(run).run.status.is_over:
                operator.cancel(run)  # otherwise the other devices wait for it
            if failure is not None:
                what = f"{type(failure).__name__}: {failure}"
                raise SFPromptError(f"a device ended with {what}") from failure
            results = operator.results(run)
        if results.run.status != "finished":
            raise SFPromptError(f"the run ended as {results.run.status}: {results.run.reason}")
        return results

    def _take_part(self, run: str, name: str, data: Dataset) -> None:
        with closing(DeviceClient(self._url)) as client:
            home = self._folder / "devices" / name
            device = Participant(client, data, home, name, _Silent())
            device.join(run, f"{run}-{name}").take_part()


@contextmanager
def running_node(folder: Path) -> Iterator[Node]:
    """Start a server in this process, and stop it at the end.

    Raises:
        SFPromptError: it does not start.
    """
    data_dir = folder / "server"
    data_dir.mkdir(parents=True, exist_ok=True)
    settings = load_settings({"port": 0, "data_dir": data_dir})
    server = build_server(create_app(settings), settings)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    with shared_backbones(data_dir):
        thread.start()
        try:
            give_up_at = time.monotonic() + _START_TIMEOUT_S
            while not server.started:
                if not thread.is_alive() or time.monotonic() > give_up_at:
                    raise SFPromptError("the server does not start")
                time.sleep(0.02)
            yield Node(f"http://127.0.0.1:{listener.getsockname()[1]}", folder)
        finally:
            server.should_exit = True
            thread.join(_STOP_TIMEOUT_S)


class _Silent:
    """A reporter that reports nothing."""

    def event(self, kind: str, **data: Any) -> None: ...

    def advance(self, phase: str, done: int, total: int) -> None: ...

    def close(self) -> None: ...
