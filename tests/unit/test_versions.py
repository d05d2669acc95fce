"""The version: the same in each package and command, and shown without loading torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module, metadata

import pytest

COMMANDS = {
    "split-server": "split_server.cli",
    "edge-client": "edge_client.cli",
    "sfprompt-bench": "sfprompt_bench.cli",
}


@pytest.mark.parametrize("package", ["split_model", "edge_client", "split_server"])
def test_a_package_has_the_installed_version(package: str) -> None:
    assert import_module(package).__version__ == metadata.version("sfprompt")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_shows_its_version_without_torch(command: str) -> None:
    code = (
        f"import sys, {COMMANDS[command]} as cli; from typer.testing import CliRunner; "
        "shown = CliRunner().invoke(cli.app, ['--version']); assert not shown.exit_code, shown; "
        "assert 'torch' not in sys.modules; print(shown.output)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == f"{command} {metadata.version('sfprompt')}"
