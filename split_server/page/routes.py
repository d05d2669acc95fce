"""The routes of the operator's page: its files, its session, and what only a browser needs."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import segno
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from pydantic import Field, SecretStr
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from protocol.base import Message
from protocol.errors import InvalidField, NotFound, Unauthorized
from protocol.messages import parse_message
from protocol.presets import Form, over_form
from protocol.settings import RunSettings
from split_server.federation.credentials import Operator
from split_server.http.services import Services
from split_server.page.session import set_cookie
from split_server.settings import parse_toml

_ASSETS = Path(__file__).parent / "assets"

_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Login(Message):
    """The operator token, for a session."""

    token: SecretStr


class SettingsText(Message):
    """Settings of a run in TOML, over the defaults of a form."""

    toml: str = Field(max_length=100_000)
    form: Form = "default"


class PageRoutes:
    """The routes of the page.

    Args:
        services: services of the server.

    Attributes:
        router: the router to include in the app.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._exporting = asyncio.Lock()  # one at a time: each holds a whole model
        self._files = {path.name: path.read_bytes() for path in _ASSETS.iterdir()}
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/", self.page, methods=["GET"])
        add("/page/{asset}", self.asset, methods=["GET"])
        add("/v1/session", self.session, methods=["GET"])
        add("/v1/session", self.log_in, methods=["POST"])
        add("/v1/session", self.log_out, methods=["DELETE"])
        add("/v1/settings", self.settings, methods=["POST"])
        add("/v1/runs/{run}/invitation", self.invitation, methods=["GET"])
        add("/v1/runs/{run}/model", self.model, methods=["GET"])

    async def page(self) -> Response:
        """Return the page; it shows nothing before the login."""
        return self._file("index.html")

    async def asset(self, asset: str) -> Response:
        """Return a file of the page."""
        return self._file(asset)

    def _file(self, name: str) -> Response:
        content = self._files.get(name)
        if content is None:
            raise NotFound("the page has no such file", field="asset", value=name[:80])
        return Response(content, media_type=_MEDIA[Path(name).suffix], headers=_HEADERS)

    async def session(self) -> dict[str, Any]:
        """Return that the sender is the operator; others may read the list of runs, too."""
        return {}

    async def log_in(self, login: Login) -> Response:
        """Open a session for the operator token."""
        token = login.token.get_secret_value()
        if not isinstance(self._services.credentials.identify(f"Bearer {token}"), Operator):
            raise Unauthorized(
                "this is not the operator token",
                field="token",
                hint="it is in the file operator.token of the server's data folder",
            )
        return self._with_cookie(self._services.sessions.open())

    async def log_out(self, request: Request) -> Response:
        """End the session of the sender."""
        self._services.sessions.close(dict(request.scope["headers"]))
        return self._with_cookie("")

    def _with_cookie(self, value: str) -> Response:
        secure = self._services.settings.tls_cert is not None
        return Response(status_code=204, headers={"set-cookie": set_cookie(value, secure=secure)})

    async def settings(self, text: SettingsText) -> dict[str, Any]:
        """Check a run's settings in TOML, and return them as the creation of a run takes them."""
        return await run_in_threadpool(_parse_settings, text)

    async def invitation(self, run: str, url: str) -> dict[str, Any]:
        """Return the command with which a device joins, and its QR code.

        Args:
            run: the run.
            url: the server's address as the browser knows it.
        """
        self._services.runs.snapshot(run)
        if urlsplit(url).scheme not in ("http", "https") or len(url) > 300:
            raise InvalidField(
                "the address of a server is http://HOST:PORT", field="url", value=url[:80]
            )
        join = self._services.settings.join_token
        words = ["edge-client", "join", url, "--run", run, "--data", "folder:photos"]
        if url.startswith("https"):
            words += ["--ca-file", "ca.pem"]
        command = shlex.join(words)
        if join is not None:
            command = f"EDGE_CLIENT_JOIN_TOKEN={shlex.quote(join.get_secret_value())} {command}"
        code = segno.make(command, micro=False, error="l")
        return {"command": command, "code": ["".join(map(str, row)) for row in code.matrix]}

    async def model(self, run: str) -> FileResponse:
        """Return the complete tuned model of a run as a safetensors file."""
        self._services.runs.snapshot(run)
        folder = Path(tempfile.mkdtemp(dir=self._services.settings.data_dir, prefix="export-"))
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        try:
            async with self._exporting:
                file = folder / "model.safetensors"
                await run_in_threadpool(_export, self._services.settings.data_dir, run, file)
        except BaseException:
            remove()
            raise
        return FileResponse(
            file,
            filename=f"{run}.safetensors",
            media_type="application/octet-stream",
            background=BackgroundTask(remove),
        )


def _parse_settings(text: SettingsText) -> dict[str, Any]:
    values = over_form(text.form, parse_toml(text.toml, "the text"))
    return parse_message(RunSettings, values).model_dump(mode="json")


def _export(data_dir: Path, run: str, file: Path) -> None:
    # Imported here: the server itself exports nothing.
    from split_server.federation.export import export_run

    export_run(data_dir, run, file)
