"""uvicorn, set up for this application."""

from __future__ import annotations

import contextlib
import gc
import socket

import uvicorn

from split_server.app import SplitServer
from split_server.folder import held_folder, require_whole
from split_server.meter import MeteredProtocol
from split_server.settings import ServerSettings
from split_server.store import Store

_GRACE_S = 10  # for requests that are being answered when the server is stopped
_KEEP_ALIVE_S = 120  # longer than a device's long poll


class Server(uvicorn.Server):
    """uvicorn's server, which lets nobody wait for news while it shuts down."""

    def __init__(self, config: uvicorn.Config, application: SplitServer) -> None:
        super().__init__(config)
        self._application = application

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.stop_waiting()
        await super().shutdown(sockets)


def build_server(application: SplitServer, settings: ServerSettings) -> Server:
    """A server that is ready to run."""
    config = uvicorn.Config(
        application,
        host=settings.host,
        port=settings.port,
        http=MeteredProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks where a request came from
        timeout_keep_alive=_KEEP_ALIVE_S,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    return Server(config, application)


def serve_until_stopped(application: SplitServer, settings: ServerSettings) -> None:
    """Hold the folder and serve until a signal comes.

    Raises:
        InvalidField: the folder is in use, cannot be used, or is of another release.
    """
    with held_folder(settings.data_dir):
        require_whole(settings.data_dir, settings.database)
        Store(settings.database).close()  # a wrong schema is told in one line, not in a traceback
        # A search for cycles in all that was imported takes a fifth of a second: not while serving.
        gc.collect()
        gc.freeze()
        with contextlib.suppress(KeyboardInterrupt):
            build_server(application, settings).run()
