"""Who may do what: every route, tried by every role, against the table of rights."""

from __future__ import annotations

import re
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from split_server.http.rights import RIGHTS, Right, Role, list_routes, require_rows
from split_server.http.split_plane import ROUTES
from tests.support.federation import run_settings
from tests.support.server import ApiClient, RunningServer, code_of, running_server

JOIN = "the-join-token"

SECURITY = Path(__file__).parents[2] / "SECURITY.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("node")
    with running_server(folder, join_token=JOIN, body_timeout_s=2.0) as running:
        yield running


@dataclass(frozen=True)
class Run:
    id: str
    sha256: str  # of its state


@pytest.fixture(scope="module")
def run(server: RunningServer) -> Run:
    view = server.operator().create(run_settings(min_participants=99))
    return Run(view.id, view.state.sha256)


@pytest.fixture(scope="module")
def other_run(server: RunningServer) -> Run:
    view = server.operator().create(run_settings(min_participants=99, seed=1), key="other")
    return Run(view.id, view.state.sha256)


def routes_of(server: RunningServer) -> list[tuple[str, str]]:
    app = server.server._application._fastapi
    return [*list_routes(app.routes), *(("POST", path) for path in ROUTES)]


def send(api: ApiClient, right: Right, run: Run) -> httpx.Response:
    """Send a request that nobody could mistake for a valid one, without content and key."""
    path = right.path.format(
        run=run.id, sha256=run.sha256, participant="p9999", asset="index.html", round_=1
    )
    query = f"?base={run.sha256}" if path.endswith("/delta") else ""
    if path.endswith("/stream"):  # it does not end while the run is open
        with api.http.stream("GET", path) as response:
            if response.is_error:
                response.read()
            return response
    return api.call(right.method, path + query)


def sender(server: RunningServer, role: Role, run: Run) -> ApiClient:
    if role is Role.STRANGER:
        return server.api()
    if role is Role.JOINER:
        return server.api(JOIN)
    if role is Role.OPERATOR:
        return server.operator()
    # A participant of its own for each request: one of them is to leave.
    name = uuid.uuid4().hex
    return server.api(server.api(JOIN).join(run.id, name, key=name).credential)


def test_every_route_has_a_row_and_every_row_a_route(server: RunningServer) -> None:
    """Tried: nothing. The table of rights has the routes of the server."""
    assert sorted(routes_of(server)) == sorted((right.method, right.path) for right in RIGHTS)


def test_a_route_without_a_row_stops_the_server_from_starting() -> None:
    """Tried: a new route that nobody has given rights. Stopped by: the server does not start."""
    with pytest.raises(LookupError, match="GET /v1/new has no row"):
        require_rows([("GET", "/v1/health"), ("GET", "/v1/new")])


@pytest.mark.parametrize("right", RIGHTS, ids=lambda right: f"{right.method} {right.path}")
def test_every_route_lets_in_the_roles_of_its_row_and_no_others(
    server: RunningServer, run: Run, right: Right
) -> None:
    """Tried: each request with no credential, the join token, a credential, the operator's token.
    Stopped by: the table of rights."""
    for role in Role:
        answer = send(sender(server, role, run), right, run)
        if role in right.roles:
            assert answer.status_code not in (401, 403), role
        else:
            expected = "unauthorized" if role is Role.STRANGER else "forbidden"
            assert code_of(answer) == expected, (role, answer.text)


@pytest.mark.parametrize(
    "right",
    [right for right in RIGHTS if Role.PARTICIPANT in right.roles and "{run}" in right.path],
    ids=lambda right: f"{right.method} {right.path}",
)
def test_a_credential_of_another_run_opens_no_run(
    server: RunningServer, run: Run, other_run: Run, right: Right
) -> None:
    """Tried: a run is read or changed with a credential of another run. Stopped by: a credential
    counts in its run only."""
    answer = send(sender(server, Role.PARTICIPANT, other_run), right, run)
    assert code_of(answer) == "forbidden"
    if Role.JOINER not in right.roles:
        assert answer.json()["error"]["field"] == "run"


@pytest.mark.parametrize(
    "token", ["x", "sfp1...", "sfp1.r.p.0", JOIN[:-1], JOIN + "x", JOIN.upper(), "operator"]
)
def test_a_guessed_token_is_a_strangers(server: RunningServer, token: str) -> None:
    """Tried: tokens that are almost right. Stopped by: they are compared whole, in constant
    time."""
    api = server.api()
    api.http.headers["authorization"] = f"Bearer {token}"
    assert code_of(api.call("GET", "/v1/runs")) == "unauthorized"
    assert code_of(api.call("GET", "/metrics")) == "unauthorized"


@pytest.mark.parametrize(
    "path",
    ["/v1/runs/", "//v1/runs", "/v1//runs", "/v1/./runs", "/v1/%72uns", "/V1/runs", "/v1/runs;x"],
)
def test_no_other_spelling_of_a_path_evades_the_table(server: RunningServer, path: str) -> None:
    """Tried: the list of runs under paths that the table might not match. Stopped by: the path that
    is served is the path that is checked."""
    stranger = server.api()
    answer = httpx.request("GET", server.url + path, trust_env=False, follow_redirects=True)
    assert answer.status_code in (401, 404), answer.text
    stranger.close()


def test_a_stranger_s_body_is_not_read(server: RunningServer) -> None:
    """Tried: a stranger sends a large body. Stopped by: rights are checked before the body is
    read."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        head = "POST /v1/runs HTTP/1.1\r\nhost: x\r\nsfprompt-version: 2\r\ncontent-length: 1000000"
        raw.sendall(f"{head}\r\n\r\n".encode())
        assert raw.recv(12) == b"HTTP/1.1 401"


def test_without_a_join_token_everybody_may_do_what_a_joiner_may(tmp_path: Path) -> None:
    """Tried: a stranger reads results and metrics of a server without a join token. Stopped by:
    only what a joiner may do is open."""
    with running_server(tmp_path) as running:
        run = running.operator().create(run_settings(min_participants=99)).id
        stranger = running.api()
        assert [each["id"] for each in stranger.call("GET", "/v1/runs").json()] == [run]
        assert code_of(stranger.call("GET", f"/v1/runs/{run}/results")) == "unauthorized"
        assert code_of(stranger.call("GET", "/metrics")) == "unauthorized"
        participant = running.api(stranger.join(run).credential)
        assert participant.call("GET", "/v1/runs").is_success


def test_the_documented_table_is_the_table_of_the_code() -> None:
    """Tried: nothing. The page shows the table of the code."""
    rows = re.findall(r"^\| `([A-Z]+) (/\S*)` \| (.+) \|$", SECURITY.read_text(), re.MULTILINE)
    documented = [
        Right(method, path, frozenset(role for role, cell in zip(Role, cells, strict=True) if cell))
        for method, path, text in rows
        for cells in [[cell.strip() == "yes" for cell in text.split("|")]]
    ]
    assert documented == list(RIGHTS)
