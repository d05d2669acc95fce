"""The nginx configuration of docs/hosting.md, where nginx is installed: a run goes through it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
import trustme

from edge_client.data.dataset import Dataset
from edge_client.participant import Participant, succeeded
from edge_client.transport.client import Server
from protocol.errors import TooLarge
from protocol.settings import RunSettings
from protocol.wire import SAMPLES_PATH
from split_server.client import OperatorClient
from tests.support.edge import CLASSES, image_set
from tests.support.federation import OPERATOR
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer

NGINX = os.environ.get("NGINX") or shutil.which("nginx")

PAGE = Path(__file__).parents[2] / "docs" / "hosting.md"

SETTINGS = {
    "model": {
        "backbone": "test_vit",
        "weights": "random:0",
        "image_size": 32,
        "num_classes": len(CLASSES),
    },
    "method": {"name": "sfprompt", "rank": 16},
    "federation": {"rounds": 1},
}


def configuration(upstream: int, port: int, folder: Path) -> str:
    (block,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for old, new in (
        ("8443", f"127.0.0.1:{port}"),
        ("http://127.0.0.1:8500/", f"http://127.0.0.1:{upstream}/"),
        ("/etc/sfprompt", str(folder)),
        ("256m", "1m"),
    ):
        assert old in block
        block = block.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    return (
        f"daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{block} }}\n"
    )


@pytest.fixture
def address(server: RunningServer, tmp_path: Path) -> Iterator[str]:
    if NGINX is None:
        pytest.skip("nginx is not installed; NGINX may name its program")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    certificate = trustme.CA()
    issued = certificate.issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "key.pem")
    for part in issued.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    certificate.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "nginx.conf").write_text(configuration(server.port, port, tmp_path))
    command = [NGINX, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)]
    with subprocess.Popen([*command, "-e", str(tmp_path / "errors")]) as nginx:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield f"https://localhost:{port}/sfprompt"
        nginx.terminate()


def test_a_run_goes_through_nginx_and_a_large_body_is_named(address: str, tmp_path: Path) -> None:
    trusted = tmp_path / "ca.pem"
    data = Dataset(image_set(18), image_set(6, seed=1))
    with (
        closing(OperatorClient(address, OPERATOR, trusted)) as operator,
        closing(Server(address, ca_file=trusted)) as client,
    ):
        run = operator.create_run(RunSettings.model_validate(SETTINGS))
        joined = Participant(client, data, tmp_path / "home", "a", SilentReporter()).join(
            run.id, "key"
        )
        assert succeeded(joined.take_part())
        assert operator.results(run.id).rounds[-1].accuracy is not None
        with pytest.raises(TooLarge, match=r"status 413.*client_max_body_size"):
            client.send_frame(
                SAMPLES_PATH, "samples", {}, {"smashed": (torch.zeros(600_000), "float32")}
            )
