"""The commands' first words: help, versions and errors are printed without the slow libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

# Runs the command lines of its first argument one after the other, and prints for each its exit
# code, its output with the error, and the slow libraries that are loaded by then.
PROGRAM = """
import json, sys
from importlib import import_module
from typer.main import get_command
from typer.testing import CliRunner

SLOW = {"torch", "timm", "torchvision", "sklearn", "matplotlib", "fastapi", "sqlalchemy"}
lines, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
apps = {name: import_module(name.replace("-", "_") + ".cli").app for name in commands}
for name, app in apps.items():
    for subcommand in get_command(app).list_commands(None):
        lines += [[name, subcommand, "--help"], [name, subcommand, "--no-such-option"]]
for name, *words in lines:
    done = CliRunner().invoke(apps[name], words)
    known = done.exception is None or isinstance(done.exception, SystemExit)
    error = "" if known else f"{type(done.exception).__name__}: {done.exception}"
    loaded = sorted(SLOW & set(sys.modules))
    print(json.dumps([[name, *words], done.exit_code, done.output + error, loaded]))
"""

COMMANDS = ["edge-client", "split-server", "sfprompt-bench"]

NOBODY = "http://127.0.0.1:1"

# Command lines with a mistake, and a part of the error.
MISTAKES = {
    f"edge-client join {NOBODY} --data digits --patience 0": "Unreachable",
    f"edge-client join {NOBODY} --data nonsense": "nonsense",
    f"edge-client join {NOBODY} --data digits --part 5/4": "5/4",
    f"edge-client join {NOBODY} --data digits --part 1/4 --partition dirichlet:-1": "alpha",
    f"edge-client join {NOBODY} --data digits --link slow": "slow",
    "edge-client join node:8500 --data digits": "http://HOST:PORT",
    f"edge-client predict {NOBODY} absent.png": "absent.png",
    "edge-client leave node:8500": "http://HOST:PORT",
    "edge-client check absent": "absent",
    "split-server serve --max-frame-mib 0": "max_frame_mib",
    "split-server create-run --set method.name=unknown --operator-token 12345678": "no such method",
    f"split-server runs --url {NOBODY} --operator-token 12345678": "Unreachable",
    "split-server watch RUN --data-dir absent": "absent",
    "split-server export RUN --data-dir absent --out model.safetensors": "absent",
    "split-server export RUN --data-dir absent --out model.pt": "NAME.safetensors",
    "split-server create-run --set rounds=3 --operator-token 12345678": "federation.rounds?",
    "sfprompt-bench run --data unknown": "unknown",
    "sfprompt-bench run --partition dirichlet:much": "dirichlet:much",
    "sfprompt-bench compare": "compare takes a file",
    "sfprompt-bench estimate --cut -1": "cut",
    "sfprompt-bench leak --data unknown": "unknown",
}


@pytest.fixture(scope="module")
def shown() -> list[tuple[list[str], int, str, list[str]]]:
    """Command line, exit code, output and loaded slow libraries of all commands, in one process."""
    lines = [[name, option] for name in COMMANDS for option in ("--version", "--help", "unknown")]
    lines += [line.split() for line in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines), json.dumps(COMMANDS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    results: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    return results


def test_no_first_word_waits_for_a_slow_library(shown: list[Any]) -> None:
    waited = [(" ".join(line), loaded) for line, _, _, loaded in shown if loaded]
    assert waited[:1] == []
    assert len(shown) > 50


def test_help_and_version_succeed_and_mistakes_do_not(shown: list[Any]) -> None:
    for line, code, output, _ in shown:
        right = line[-1] in ("--version", "--help")
        assert (code == 0) == right, (line, output)


def test_each_command_shows_the_installed_version(shown: list[Any]) -> None:
    versions = [output for line, _, output, _ in shown if line[-1] == "--version"]
    assert versions == [f"{name} {metadata.version('sfprompt')}\n" for name in COMMANDS]


def test_an_error_names_the_mistake(shown: list[Any]) -> None:
    outputs = {" ".join(line): output for line, _, output, _ in shown}
    for line, part in MISTAKES.items():
        assert part in outputs[line], line
