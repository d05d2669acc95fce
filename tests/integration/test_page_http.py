"""The operator's page over real HTTP: its session, its headers, and what a browser needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import split_server.page
from protocol.wire import IDEMPOTENCY_HEADER, PROTOCOL_VERSION, VERSION_HEADER
from split_server.page.session import LIFETIME_S, Sessions, set_cookie
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer, code_of, new_run, running_server

ASSETS = Path(split_server.page.__file__).parent / "assets"

JOIN = "join me; it's open"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node"), join_token=JOIN) as running:
        yield running


@pytest.fixture
def browser(server: RunningServer) -> httpx.Client:
    """A client that keeps cookies, and that has logged in."""
    api = server.api()
    answer = api.call("POST", "/v1/session", json={"token": OPERATOR})
    assert answer.status_code == 204
    return api.http


def test_the_page_and_all_its_files_come_from_the_package_alone(server: RunningServer) -> None:
    page = server.api().call("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    names = {path.name for path in ASSETS.iterdir()}
    for name in names:
        answer = server.api().call("GET", f"/page/{name}")
        assert answer.content == (ASSETS / name).read_bytes()
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert answer.headers["x-content-type-options"] == "nosniff"
        outside = set(re.findall(r"https?://[^\s\"']+", answer.text))
        assert outside <= {"http://www.w3.org/2000/svg"}, "a name of the language, no address"
    assert set(re.findall(r"page/([\w.]+)", page.text)) <= names
    for wrong in ("x.js", "..%2froutes.py", "__init__.py"):
        assert code_of(server.api().call("GET", f"/page/{wrong}")) == "not_found"


def test_the_page_speaks_the_servers_version() -> None:
    assert f'VERSION = "{PROTOCOL_VERSION}"' in (ASSETS / "api.js").read_text()


def test_the_operator_token_alone_opens_a_session(server: RunningServer) -> None:
    for wrong in (JOIN, "x", ""):
        answer = server.api().call("POST", "/v1/session", json={"token": wrong})
        assert code_of(answer) == "unauthorized"
        assert code_of(server.api().call("GET", "/v1/session")) == "unauthorized"
        assert "set-cookie" not in answer.headers
    cookie = (
        server.api().call("POST", "/v1/session", json={"token": OPERATOR}).headers["set-cookie"]
    )
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert OPERATOR not in cookie
    assert "Secure" not in cookie
    assert set_cookie("v", secure=True).endswith("; Secure")


def test_a_session_is_the_operators_until_the_logout(
    server: RunningServer, browser: httpx.Client
) -> None:
    assert browser.get("/v1/runs").is_success
    copied = dict(browser.cookies)
    assert browser.delete("/v1/session").status_code == 204
    assert not browser.cookies
    again = server.api().call(
        "GET",
        "/v1/runs",
        headers={"cookie": "; ".join(f"{name}={value}" for name, value in copied.items())},
    )
    assert code_of(again) == "unauthorized", "a copied cookie ends with its session"


def test_another_site_cannot_use_a_session(server: RunningServer, browser: httpx.Client) -> None:
    """Tried: what a page of another port or host can make a browser send."""
    run = new_run(server.operator(), min_participants=2)
    path = f"/v1/runs/{run}/cancel"
    for site in ("same-site", "cross-site"):
        headers = {IDEMPOTENCY_HEADER: "k", "sec-fetch-site": site}
        assert code_of(browser.post(path, headers=headers)) == "unauthorized"
    form = httpx.Client(base_url=server.url, cookies=browser.cookies, trust_env=False)
    with form:  # as a form sends it: without headers of its own
        assert code_of(form.post(path)) == "unsupported_version"
    ok = {IDEMPOTENCY_HEADER: "k", "sec-fetch-site": "same-origin"}
    assert VERSION_HEADER in browser.headers
    assert browser.post(path, headers=ok).is_success


def test_sessions_end_with_time_and_the_oldest_for_a_new_one() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0])

    def is_open(value: str) -> bool:
        return sessions.is_open({b"cookie": set_cookie(value, secure=False).split(";")[0].encode()})

    first = sessions.open()
    now[0] = LIFETIME_S - 1
    assert is_open(first)
    now[0] += 1
    assert not is_open(first)
    values = [sessions.open() for _ in range(65)]
    assert [is_open(value) for value in values] == [False] + [True] * 64
    assert not sessions.is_open({})
    assert not sessions.is_open({b"cookie": b"\xff=;;[bad"})


def test_settings_in_toml_become_those_that_create_a_run(browser: httpx.Client) -> None:
    toml = 'name = "mine"\nclass_names = ["a", "b"]\n[model]\nnum_classes = 2\n'
    settings = browser.post("/v1/settings", json={"toml": toml}).json()
    assert (settings["name"], settings["method"]["name"]) == ("mine", "sfprompt")
    wrong = browser.post("/v1/settings", json={"toml": "[model]\nnum_clases = 2\n"})
    assert "num_classes" in wrong.json()["error"]["hint"]
    assert code_of(browser.post("/v1/settings", json={"toml": "=?"})) == "invalid_field"


def test_an_invitation_holds_what_a_device_needs(
    server: RunningServer, browser: httpx.Client
) -> None:
    run = new_run(server.operator(), min_participants=2)
    path = f"/v1/runs/{run}/invitation"
    answer = browser.get(path, params={"url": "https://node:8500"}).json()
    assert answer["command"] == (
        "EDGE_CLIENT_JOIN_TOKEN='join me; it'\"'\"'s open' edge-client join https://node:8500 "
        f"--run {run} --data folder:photos --ca-file ca.pem"
    )
    assert len(answer["code"]) == len(answer["code"][0]) >= 21
    assert code_of(browser.get(path, params={"url": "javascript:x"})) == "invalid_field"
