"""The documentation: its limits, its links and paths, and its generated pages."""

import re
import subprocess
from pathlib import Path

import pytest

from tools import attacks_table, pictures_page, settings_page

ROOT = Path(__file__).parents[2]

GUIDES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")

PAGES = [ROOT / name for name in GUIDES] + sorted((ROOT / "docs").glob("*.md"))

# What a path in backticks begins with; other backticks hold names, settings and commands.
FOLDERS = (
    "protocol|pruning|split_model|edge_client|split_server|tuning_methods|sfprompt|sfprompt_bench"
    "|tests|docs|tools|examples"
)

PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")

LINK = re.compile(r"\]\(([^)\s]+)\)")

PROSE_PAGES = ("architecture.md", "hosting.md", "method.md", "privacy.md", "quickstart.md")

MEASURED = re.compile(r"\d ?%|\d (?:MB|GB|ms|points|samples/s)\b")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_keeps_its_limits() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 800
    assert len(re.findall(r"\d+(?:[.,]\d+)*", text)) <= 40


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_path_in_backticks_exists(page: Path) -> None:
    paths = PATH.findall(page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_link_to_a_heading_is_looked_up_as_github_names_it() -> None:
    assert "where-to-change-what" in anchors(ROOT / "docs" / "architecture.md")


def test_every_security_test_says_what_it_tries_and_what_stops_it() -> None:
    attacks = attacks_table.attacks()
    assert [each.test for each in attacks if not each.is_described] == []
    assert len([each for each in attacks if not each.is_none]) >= 25
    assert attacks_table.PAGE.read_text() == attacks_table.render(), "stale: run `make docs`"


def test_the_settings_page_is_current() -> None:
    assert settings_page.PAGE.read_text() == settings_page.render(), "stale: run `make docs`"


def test_the_table_of_pictures_is_current() -> None:
    assert pictures_page.PAGE.read_text() == pictures_page.render(), "stale: run `make docs`"


@pytest.mark.parametrize("name", PROSE_PAGES)
def test_measurements_stand_in_the_results_only(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text().splitlines()
    found = [line for line in lines if MEASURED.search(line)]
    assert [line for line in found if "free disk" not in line] == []


def test_the_repository_carries_no_heavy_results() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    files = [ROOT / line for line in listed.stdout.splitlines()] or [*(ROOT / "docs").rglob("*.*")]
    assert not [path for path in files if path.suffix == ".html"]
    assert sum(path.stat().st_size for path in files if path.exists()) < 600_000
