"""The rooms know of each other in one direction only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "protocol": set(),
    "pruning": {"protocol"},
    "split_model": {"protocol"},
    "edge_client": {"protocol", "pruning", "split_model"},
    "split_server": {"protocol", "split_model"},
    "benchmark": {"protocol", "pruning", "split_model", "edge_client", "split_server"},
}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            rooms.add(node.module.split(".")[0])
    return rooms & set(MAY_IMPORT)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= MAY_IMPORT[room] | {room}, path


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_only_one_module_imports_timm_and_torchvision(library: str) -> None:
    importers = [
        path.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.Import)
            and any(a.name.split(".")[0] == library for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library)
    ]
    assert set(importers) <= {"split_model/libraries.py"}
