"""The rooms know of each other in one direction only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "protocol": set(),
    "pruning": {"protocol"},
    "split_model": {"protocol"},
    "edge_client": {"protocol", "pruning", "split_model"},
    "split_server": {"protocol", "split_model"},
    "sfprompt_bench": {"protocol", "pruning", "split_model", "edge_client", "split_server"},
}


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & set(MAY_IMPORT) <= MAY_IMPORT[room] | {room}, path


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_only_one_module_imports_timm_and_torchvision(library: str) -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*.py")
        if library in imported(path) or f'import_module("{library}")' in path.read_text()
    }
    assert importers == {"split_model/backbone/libraries.py"}


@pytest.mark.parametrize("cli", ["split_server.cli", "edge_client.cli", "sfprompt_bench.cli"])
def test_help_does_not_wait_for_torch(cli: str) -> None:
    code = (
        f"import sys, {cli} as cli; from typer.testing import CliRunner; "
        "shown = CliRunner().invoke(cli.app, ['--help']); assert not shown.exit_code, shown; "
        "print({'torch', 'timm', 'fastapi', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"
