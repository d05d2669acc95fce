"""The commands of this project, run in this process: a process spends seconds on its imports."""

from __future__ import annotations

import shlex
import signal

import torch
from typer.testing import CliRunner, Result

from edge_client.cli import app as edge_client
from split_server.cli import app as split_server

_APPS = {"edge-client": edge_client, "split-server": split_server}


def run_command(command: str) -> Result:
    """Run a command line; a command that fails raises its error."""
    name, *arguments = shlex.split(command)
    threads, terminated = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(_APPS[name], arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, terminated)
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result
