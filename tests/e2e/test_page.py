"""The operator's page in a real browser: each flow clicked, with a real server and devices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs the package playwright")

from playwright.sync_api import Page, expect

from split_model.checkpoints.export import load_exported
from tests.e2e.devices import DeviceThreads
from tests.support.browser import CHROMIUM, open_page
from tests.support.federation import OPERATOR, state_of
from tests.support.server import RunningServer, new_run, running_server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

TOML = """\
name = "digits at home"
[model]
backbone = "test_vit"
weights = "random:3"
image_size = 32
num_classes = 10
[federation]
rounds = 2
min_participants = 2
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def page(server: RunningServer, tmp_path: Path) -> Iterator[Page]:
    """The page, after a failed and a successful login."""
    with open_page(server.url, tmp_path / "profile") as opened:
        opened.get_by_label("Operator token").fill("wrong")
        opened.keyboard.press("Enter")
        expect(opened.get_by_role("alert")).to_contain_text("not the operator token")
        opened.get_by_label("Operator token").fill(OPERATOR)
        opened.keyboard.press("Enter")
        expect(opened.get_by_role("heading", name="Runs")).to_be_visible()
        yield opened


def click(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def test_a_run_is_made_watched_downloaded_and_deleted(
    page: Page, server: RunningServer, tmp_path: Path
) -> None:
    page.get_by_role("link", name="New run").click()
    form = page.get_by_role("form", name="Settings in TOML")
    form.get_by_label("Or paste").fill(TOML.replace("rounds", "ronds"))
    form.get_by_role("button", name="Create the run").click()
    expect(page.get_by_role("alert")).to_contain_text("did you mean federation.rounds")
    form.get_by_label("Or paste").fill(TOML)
    form.get_by_role("button", name="Create the run").click()
    expect(page.get_by_role("heading", name="digits at home")).to_be_visible()
    summary = page.get_by_role("status")
    expect(summary).to_contain_text("0 of 2 devices; 2 more needed")
    run = page.url.rsplit("/", 1)[1]

    click(page, "Show the command")
    expect(page.get_by_text(f"edge-client join {server.url} --run {run}")).to_be_visible()
    expect(page.get_by_role("img", name="QR code of the command")).to_be_visible()

    click(page, "Pause")
    expect(summary).to_have_text("The run is paused; resume it to go on.")
    devices = DeviceThreads(server.url, run, 2, tmp_path)
    for name in ("device-1", "device-2"):
        expect(page.get_by_role("row", name=name)).to_contain_text("waiting")
    click(page, "Resume")
    expect(summary).to_have_text("The run is finished.")
    devices.wait()
    expect(page.get_by_role("img", name=re.compile("Accuracy, last"))).to_be_visible()
    expect(page.get_by_text("closed-form start")).to_be_visible()
    expect(page.get_by_text("always the largest class")).to_be_visible()
    expect(page.get_by_text("round 2 is closed")).to_be_visible()
    expect(page.get_by_text("federated full fine-tuning in as many rounds")).to_be_visible()
    expect(page.get_by_role("rowheader", name="9", exact=True)).to_be_visible()  # of the matrix

    with page.expect_download() as download:
        page.get_by_role("link", name="Download the model").click()
    model = tmp_path / "model.safetensors"
    download.value.save_as(model)
    assert download.value.suggested_filename == f"{run}.safetensors"
    assert load_exported(model) is not None

    click(page, "Delete")
    click(page, "Keep it")
    click(page, "Delete")
    click(page, "Delete the run")
    expect(page.get_by_text("There is no run yet.")).to_be_visible()


def test_a_round_is_closed_a_device_removed_and_a_run_cancelled(
    page: Page, server: RunningServer
) -> None:
    run = new_run(server.operator(), min_participants=2, evaluate_every=0)
    page.get_by_role("link", name=re.compile("small")).click()
    close = page.get_by_role("button", name="Close the round now")
    expect(close).to_be_disabled()
    kitchen = server.api(server.api().join(run, "kitchen").credential)
    garage = server.api(server.api().join(run, "<b>garage</b>").credential)
    expect(page.get_by_role("status")).to_contain_text("Round 1 of 2 waits for the updates of")
    close.click()
    expect(page.get_by_role("alert")).to_contain_text("too few updates")
    assert kitchen.update(run, state_of(1.0), "u").is_success
    expect(page.get_by_role("status")).to_have_text(
        "Round 1 of 2 waits for the updates of <b>garage</b>."
    )
    close.click()
    expect(page.get_by_role("status")).to_contain_text("Round 2 of 2 waits for the updates")
    click(page, "Remove <b>garage</b>")
    click(page, "Remove the device")
    expect(page.get_by_role("row", name="garage")).to_contain_text("removed")
    assert garage.call("GET", f"/v1/runs/{run}/assignment").is_error

    page.set_viewport_size({"width": 390, "height": 800})  # a phone
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    click(page, "Cancel")
    click(page, "Cancel the run")
    expect(page.get_by_role("status")).to_contain_text("The run is cancelled")
    click(page, "Log out")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
