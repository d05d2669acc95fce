"""Which package may import which, what the core may name, and how large a source file may be."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CORE_PACKAGES = {"protocol", "pruning", "split_model", "edge_client", "split_server"}

MAY_IMPORT = {
    "protocol": set(),
    "pruning": {"protocol"},
    "split_model": {"protocol"},
    "edge_client": {"protocol", "pruning", "split_model"},
    "split_server": {"protocol", "split_model"},
    "tuning_methods": CORE_PACKAGES,
    "sfprompt_bench": CORE_PACKAGES | {"tuning_methods"},
    "sfprompt": CORE_PACKAGES | {"tuning_methods", "sfprompt_bench"},  # the face of them all
    "tools": CORE_PACKAGES | {"tuning_methods", "sfprompt", "sfprompt_bench"},
}

PACKAGES = sorted(package for package in MAY_IMPORT if (ROOT / package).is_dir())

HTTP = {"starlette", "fastapi", "uvicorn", "split_server.http"}

# A folder, and the libraries and modules that no file in it imports.
MUST_NOT_IMPORT = {
    "protocol": HTTP | {"httpx", "torch", "timm", "torchvision"},
    "pruning": {"torch"},
    "split_server/runtime": HTTP,
    "split_server/storage": HTTP | {"split_server.engine", "split_server.federation"},
    "split_server/aggregation": HTTP,
    "split_server/payloads": HTTP,
    "split_server/engine": HTTP | {"split_server.federation", "split_server.storage"},
    "split_server/models": HTTP,
    "split_server/http": {"sqlalchemy"},
    "edge_client/transport": {"edge_client.training"},
    "edge_client/data": {"edge_client.transport", "edge_client.training", "edge_client.storage"},
    "edge_client/storage": {"edge_client.training"},
}

# Imports that a rule does not mean, or that are still to be removed: a file, and a module or name.
IMPORT_EXCEPTIONS = {
    # Imported only when a tensor or a device of torch is passed.
    ("protocol/torch_arrays.py", "torch"),
    # Types of signatures only.
    ("protocol/arrays.py", "torch"),
    ("protocol/frames.py", "torch"),
    ("protocol/codecs/codec.py", "torch"),
    # SQLite reports a full disk as `OperationalError`; the server answers `busy`.
    ("split_server/http/errors.py", "sqlalchemy.exc.OperationalError"),
}

# Ideas of single tuning methods, which only the methods' own packages name.
METHOD_IDEAS = re.compile(
    r"(?<!HTTP )prox(y|ies)(?!_headers|_read_timeout)|fedpft|offsite|local.bod", re.IGNORECASE
)

# Files that name settings of former releases, to refuse or to ignore them.
NAME_FORMER_SETTINGS = {"protocol/settings.py", "split_model/checkpoints/metadata.py"}

MIN_LINES, MAX_LINES = 20, 450

# Files that are still to be joined with others or to be split.
SIZE_EXCEPTIONS: set[str] = set()


def source_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return files


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Full names of what a file imports: ``a.b`` for both `import a.b` and `from a import b`."""
    package = relative(path).split("/")[:-1]
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def forbidden_imports(folder: str, forbidden: set[str]) -> set[tuple[str, str]]:
    """File and name of each forbidden import that is not an exception."""
    return {
        (relative(path), name)
        for path in source_files(folder)
        for name in imported(path)
        if any(is_within(name, module) for module in forbidden)
        and not any(
            relative(path) == file and is_within(name, module) for file, module in IMPORT_EXCEPTIONS
        )
    }


def test_each_package_has_a_rule() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(MAY_IMPORT)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_below_it(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    assert forbidden_imports(package, forbidden) == set()


@pytest.mark.parametrize("folder", MUST_NOT_IMPORT)
def test_a_folder_does_not_import_what_its_rule_forbids(folder: str) -> None:
    assert forbidden_imports(folder, MUST_NOT_IMPORT[folder]) == set()


@pytest.mark.parametrize("exception", sorted(IMPORT_EXCEPTIONS))
def test_each_import_exception_is_still_needed(exception: tuple[str, str]) -> None:
    file, module = exception
    path = ROOT / file
    assert path.is_file(), "delete this exception"
    assert any(is_within(name, module) for name in imported(path)), "delete this exception"


@pytest.mark.parametrize("package", sorted(CORE_PACKAGES))
def test_the_core_names_no_idea_of_a_single_method(package: str) -> None:
    named = {
        (relative(path), line.strip())
        for path in source_files(package)
        for line in path.read_text().splitlines()
        if METHOD_IDEAS.search(line) and relative(path) not in NAME_FORMER_SETTINGS
    }
    assert named == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_source_files_have_between_20_and_450_lines(package: str) -> None:
    sizes = {
        relative(path): len(path.read_text().splitlines())
        for path in source_files(package)
        if path.name != "__init__.py"
    }
    wrong = {path: lines for path, lines in sizes.items() if not MIN_LINES <= lines <= MAX_LINES}
    excepted = {path for path in SIZE_EXCEPTIONS if path.startswith(f"{package}/")}
    assert wrong.keys() == excepted, f"lines by file: {wrong}; exceptions: {excepted}"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_init_file_says_what_belongs_in_its_folder(package: str) -> None:
    inits = [path for path in source_files(package) if path.name == "__init__.py"]
    assert [relative(path) for path in inits if not ast.get_docstring(parsed(path))] == []
    folders = {path.parent for path in source_files(package)}
    assert folders == {path.parent for path in inits}


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_one_module_imports_timm_and_torchvision(library: str) -> None:
    importers = {
        relative(path)
        for package in PACKAGES
        for path in source_files(package)
        if any(is_within(name, library) for name in imported(path))
        or f'import_module("{library}")' in path.read_text()
    }
    assert importers == {"split_model/backbone/libraries.py"}
