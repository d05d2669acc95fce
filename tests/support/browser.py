"""Debian's Chromium, driven by Playwright, and what a page must not do in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@contextmanager
def open_page(url: str, profile: Path, *, width: int = 1100, dark: bool = False) -> Iterator[Page]:
    """Open a page in a fresh browser; fails on any error of the page and any outside request."""
    wrong: list[str] = []
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            headless=True,
            args=_FLAGS,
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        try:
            page = context.pages[0]
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: _note_outside(request.url, url, wrong))
            page.goto(url)
            yield page
        finally:
            context.close()
    assert not wrong


def _note_outside(address: str, url: str, wrong: list[str]) -> None:
    if not address.startswith((url, "blob:", "data:")):
        wrong.append(f"request to {address}")
