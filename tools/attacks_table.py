"""Writes the table of attacks in `SECURITY.md` from the tests: `python -m tools.attacks_table`.

Each test in `tests/security/` begins its docstring with what is tried, and says what stops it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

PAGE = ROOT / "SECURITY.md"

_BEGIN, _END = "<!-- attacks: written by `make docs` -->", "<!-- end of the attacks -->"

_TRIED, _STOPPED = "Tried: ", "Stopped by: "


@dataclass(frozen=True)
class Attack:
    """What a test tries, and what stops it; both are empty where its docstring does not say so.

    Attributes:
        file: the test's file, without its suffix.
        test: the test's name.
        tried: what is tried; "nothing" where the test only shows that honest use passes.
        stopped: what stops it.
    """

    file: str
    test: str
    tried: str
    stopped: str

    @property
    def is_none(self) -> bool:
        """Whether nothing is tried."""
        return self.tried.startswith("nothing")

    @property
    def is_described(self) -> bool:
        """Whether the docstring has the form that the table needs."""
        return self.is_none or bool(self.tried and self.stopped)


def attacks() -> list[Attack]:
    """Return all tests in `tests/security/`, in the order of the files and of their lines."""
    return [
        attack
        for path in sorted((ROOT / "tests" / "security").glob("test_*.py"))
        for attack in _attacks_in(path)
    ]


def table() -> str:
    """Return the table of all attacks."""
    rows = ["| tried | stopped by | test |", "|---|---|---|"]
    rows += [
        f"| {each.tried} | {each.stopped} | `{each.file}` |"
        for each in attacks()
        if not each.is_none
    ]
    return "\n".join(rows)


def render() -> str:
    """Return the page with the current table."""
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


def _attacks_in(path: Path) -> Iterator[Attack]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = " ".join((ast.get_docstring(node) or "").split())
            tried, _, stopped = text.partition(_STOPPED)
            said = tried.removeprefix(_TRIED) if tried.startswith(_TRIED) else ""
            yield Attack(path.stem, node.name, _cell(said), _cell(stopped))


def _cell(text: str) -> str:
    return text.strip().rstrip(".").replace("|", r"\|")


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
