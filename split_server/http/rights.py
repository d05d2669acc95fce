"""Who may send which request: one table of roles, which every request is checked against.

The role follows from the credential alone. SECURITY.md shows the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from starlette.routing import BaseRoute, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import Forbidden, Unauthorized
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    LABELS_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
    SOLVE_PATH,
    START_PATH,
)
from split_server.federation.credentials import (
    Anonymous,
    Identity,
    JoinTokenHolder,
    Operator,
    ParticipantIdentity,
)
from split_server.federation.runs import RunRegistry, require_not_removed
from split_server.http.middleware import identity_of


class Role(StrEnum):
    """What the sender of a request is, by its credential."""

    STRANGER = "stranger"  # no credential, or one that this server did not issue
    JOINER = "joiner"  # the join token; everybody, if the server has none
    PARTICIPANT = "participant"  # the credential of a participant of the run in the path
    OPERATOR = "operator"  # the operator token


@dataclass(frozen=True)
class Right:
    """A route, and the roles that may use it."""

    method: str
    path: str
    roles: frozenset[Role]


def _right(method: str, path: str, *roles: Role) -> Right:
    return Right(method, path, frozenset(roles))


_ALL = tuple(Role)

_JOINER, _PARTICIPANT, _OPERATOR = Role.JOINER, Role.PARTICIPANT, Role.OPERATOR

_RUN = "/v1/runs/{run}"

RIGHTS = (
    _right("GET", "/v1/health", *_ALL),
    _right("GET", "/", *_ALL),
    _right("GET", "/page/{asset}", *_ALL),
    _right("GET", "/v1/session", _OPERATOR),
    _right("POST", "/v1/session", *_ALL),
    _right("DELETE", "/v1/session", *_ALL),
    _right("POST", "/v1/settings", _OPERATOR),
    _right("GET", "/metrics", _OPERATOR),
    _right("POST", "/v1/runs", _OPERATOR),
    _right("GET", "/v1/runs", _JOINER, _OPERATOR),
    _right("GET", _RUN, _JOINER, _PARTICIPANT, _OPERATOR),
    _right("DELETE", _RUN, _OPERATOR),
    _right("POST", f"{_RUN}/cancel", _OPERATOR),
    _right("POST", f"{_RUN}/pause", _OPERATOR),
    _right("POST", f"{_RUN}/resume", _OPERATOR),
    _right("POST", f"{_RUN}/close-round", _OPERATOR),
    _right("GET", f"{_RUN}/status", _OPERATOR),
    _right("GET", f"{_RUN}/stream", _OPERATOR),
    _right("GET", f"{_RUN}/invitation", _OPERATOR),
    _right("GET", f"{_RUN}/model", _OPERATOR),
    _right("GET", f"{_RUN}/results", _PARTICIPANT, _OPERATOR),
    _right("GET", f"{_RUN}/rounds/{{round_}}/evaluation", _OPERATOR),
    _right("GET", f"{_RUN}/events", _PARTICIPANT, _OPERATOR),
    _right("POST", f"{_RUN}/participants", _JOINER, _OPERATOR),
    _right("DELETE", f"{_RUN}/participants/me", _PARTICIPANT),
    _right("PUT", f"{_RUN}/participants/me/absence", _PARTICIPANT),
    _right("DELETE", f"{_RUN}/participants/{{participant}}", _OPERATOR),
    _right("DELETE", f"{_RUN}/samples", _PARTICIPANT),
    _right("GET", f"{_RUN}/assignment", _PARTICIPANT),
    _right("GET", f"{_RUN}/head", _PARTICIPANT, _OPERATOR),
    _right("GET", f"{_RUN}/states/{{sha256}}/state", _PARTICIPANT, _OPERATOR),
    _right("GET", f"{_RUN}/states/{{sha256}}/delta", _PARTICIPANT, _OPERATOR),
    _right("PUT", f"{_RUN}/evaluation", _PARTICIPANT),
    _right("PUT", f"{_RUN}/update", _PARTICIPANT),
    *(
        _right("POST", path, _PARTICIPANT)
        for path in (
            FORWARD_PATH,
            BACKWARD_PATH,
            EXCHANGE_PATH,
            INFER_PATH,
            SAMPLES_PATH,
            MISSING_PATH,
            START_PATH,
            SOLVE_PATH,
            LABELS_PATH,
        )
    ),
)

_BY_PATH: Mapping[tuple[str, str], Right] = {(right.method, right.path): right for right in RIGHTS}

_WITH_RUN: tuple[tuple[re.Pattern[str], Right], ...] = tuple(
    (compile_path(right.path)[0], right) for right in RIGHTS if "{" in right.path
)


def find_right(method: str, path: str) -> tuple[Right, str | None] | None:
    """Return the table's row for a request, and the run in its path; None: there is no row."""
    if (exact := _BY_PATH.get((method, path))) is not None:
        return exact, None
    for pattern, right in _WITH_RUN:
        if method == right.method and (match := pattern.match(path)) is not None:
            return right, match.groupdict().get("run")
    return None


def list_routes(routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """Return method and path of each route of an application."""
    return [
        (method, str(getattr(route, "path", route)))
        for route in routes
        for method in getattr(route, "methods", None) or ("ANY",)
    ]


def require_rows(routes: Iterable[tuple[str, str]]) -> None:
    """Check that every route has a row, so that none can be reached unchecked.

    Args:
        routes: method and path of each.

    Raises:
        LookupError: a route has none.
    """
    for method, path in routes:
        if (method, path) not in _BY_PATH:
            raise LookupError(f"{method} {path} has no row in the table of rights")


def roles_of(identity: Identity, *, is_open: bool) -> frozenset[Role]:
    """Return a sender's roles.

    Args:
        is_open: whether the server has no join token, so that everybody may join.
    """
    if isinstance(identity, Operator):
        return frozenset({Role.OPERATOR})
    role = {JoinTokenHolder: Role.JOINER, ParticipantIdentity: Role.PARTICIPANT}.get(
        type(identity), Role.STRANGER
    )
    return frozenset({role, Role.JOINER} if is_open else {role})


_NEEDED = {
    Role.JOINER: "this server's join token",
    Role.PARTICIPANT: "a participant's credential",
    Role.OPERATOR: "the operator token",
}

_HINTS = {
    Role.JOINER: "pass it to edge-client as --join-token-file or EDGE_CLIENT_JOIN_TOKEN",
    Role.PARTICIPANT: "send it as Authorization: Bearer TOKEN",
    Role.OPERATOR: "pass it to split-server as --operator-token-file; the default is in DATA_DIR",
}


def require_right(identity: Identity, right: Right, run: str | None, *, is_open: bool) -> None:
    """Refuse a sender whose roles the table does not name.

    Args:
        right: the row of the request.
        run: the run in the request's path; None: the path names none.
        is_open: as in `roles_of`.

    Raises:
        Unauthorized: no credential, or one that this server did not issue.
        Forbidden: a credential of another kind or of another run.
    """
    allowed = roles_of(identity, is_open=is_open) & right.roles
    if isinstance(identity, ParticipantIdentity) and allowed == {Role.PARTICIPANT}:
        if run is not None and identity.run != run:
            raise Forbidden("the credential belongs to another run", field="run", value=run)
        return
    if allowed:
        return
    needed = [role for role in Role if role in right.roles]
    message = "this request requires " + " or ".join(_NEEDED[role] for role in needed)
    if not isinstance(identity, Anonymous):
        raise Forbidden(f"{message}, not another credential")
    if identity.sent_credential:
        message += "; this server did not issue the one sent"
    raise Unauthorized(message, hint=_HINTS[needed[0]])


@dataclass(frozen=True)
class Guard:
    """Pure ASGI: refuses a request against the table before a byte of its body is read.

    Attributes:
        app: answers the requests that may pass; also those of no route, which it refuses.
        runs: tell which participants were removed.
        is_open: as in `roles_of`.
    """

    app: ASGIApp
    runs: RunRegistry
    is_open: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        row = find_right(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if row is not None:
            identity = identity_of(scope)
            require_right(identity, *row, is_open=self.is_open)
            if Role.STRANGER not in row[0].roles:
                self._require_valid(identity)
        await self.app(scope, receive, send)

    def _require_valid(self, identity: Identity) -> None:
        """Refuse a credential that the operator revoked.

        Raises:
            Removed: it was.
        """
        if isinstance(identity, ParticipantIdentity) and self.runs.has(identity.run):
            participants = self.runs.snapshot(identity.run).participants
            if (participant := participants.get(identity.participant)) is not None:
                require_not_removed(participant)
