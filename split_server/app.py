"""The application: everything that a server is made of, put together once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client import ProcessCollector
from starlette.types import Receive, Scope, Send

from split_server.engine.body_cache import BodyCache
from split_server.engine.engine import Engine
from split_server.engine.limits import EngineLimits
from split_server.engine.metrics import EngineFigures
from split_server.engine.tuned_bodies import TunedBodies
from split_server.federation.credentials import Credentials, load_operator_token, load_secret
from split_server.federation.liveness import Liveness
from split_server.federation.service import FederationService
from split_server.http.body import BodyBudget
from split_server.http.connection import MeteredProtocol
from split_server.http.errors import add_error_handlers
from split_server.http.federation_routes import FederationRoutes
from split_server.http.handlers import HandlerContext
from split_server.http.metrics import RunCollector, metrics_router
from split_server.http.middleware import JSONBodyLimit, RequestMiddleware
from split_server.http.split_plane import SplitPlane
from split_server.models.body_key import BodyKey
from split_server.runtime.aio import Notifier
from split_server.runtime.device import SideStreams, choose_placement
from split_server.runtime.process import Clock, descriptor_limit
from split_server.settings import OPERATOR_TOKEN_FILE, ServerSettings
from split_server.storage.data_dir import check_complete, lock_data_dir
from split_server.storage.database import Store
from split_server.storage.sample_store import SampleStore, StoreLimits
from split_server.storage.traffic import Meter

log = logging.getLogger(__name__)

_MIB = 1024 * 1024

_CODEC_THREADS = 8  # decode and encode frames

_TICK_S = 0.25  # how late a deadline may be noticed

_TICKS_PER_SAVE = 20  # between two savings of the meter


@dataclass(frozen=True)
class _Watcher:
    """Carries what happens in the federation plane to those who wait and to the engine."""

    notifier: Notifier
    engine: Engine
    samples: SampleStore

    def changed(self, run: str) -> None:
        self.notifier.notify(run)

    def round_over(self, run: str) -> None:
        self.engine.release(run)
        self.notifier.notify(run)

    def run_over(self, run: str) -> None:
        self.samples.drop(run)
        self.engine.forget(run)

    def work(self, run: str) -> Mapping[str, float]:
        figures = self.engine.figures(run)
        return figures.to_dict() if figures.tasks else {}

    def left(self, run: str, participant: str) -> None:
        self.engine.release(run, participant)
        self.samples.drop(run, participant)
        self.notifier.notify(run)


@dataclass(frozen=True)
class _Compiling:
    """Compiles the bodies of open runs before anybody has to wait for them."""

    federation: FederationService
    engine: Engine
    ready: set[BodyKey] = field(default_factory=set)

    async def prepare(self) -> None:
        """Those of the runs that are open now, but bodies that are tuned."""
        for name in self.federation.open_runs():
            run = self.federation.run(name)
            if run.plan.model.tune_body or run.body in self.ready:
                continue
            self.ready.add(run.body)
            with _logged(f"the body of run {name} could not be compiled ahead"):
                await asyncio.to_thread(self.engine.prepare, run.body)

    async def keep_on(self) -> None:
        """The same for runs that are created from now on."""
        while True:
            await asyncio.sleep(_TICK_S)
            with _logged("bodies could not be compiled ahead"):
                await self.prepare()


class SplitServer:
    """An ASGI application. Everything is opened at its start and closed at its end."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.placement = choose_placement(settings.device, settings.dtype)
        self._fastapi = FastAPI(title="SFPrompt split server", lifespan=self._lifespan)
        add_error_handlers(self._fastapi)
        self._meter = Meter()
        self._notifier: Notifier | None = None
        self._app: Any = RequestMiddleware(self._fastapi, self._meter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def stop_waiting(self) -> None:
        """Answer all long polls now: the server is about to stop."""
        if self._notifier is not None:
            self._notifier.close()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        settings = self.settings
        if settings.torch_threads is not None:
            torch.set_num_threads(settings.torch_threads)
        store = await asyncio.to_thread(Store, settings.database)
        figures = EngineFigures()
        engine = self._engine(figures)
        self._notifier = notifier = Notifier(asyncio.get_running_loop())
        samples = await asyncio.to_thread(self._sample_store)
        watcher = _Watcher(notifier, engine, samples)
        federation = await asyncio.to_thread(self._federation, store, watcher)
        room = BodyBudget(settings.queue_mib * _MIB, engine.busy_error)
        routes = FederationRoutes(
            federation,
            self._credentials,
            self._presence,
            notifier,
            engine,
            samples,
            self.placement,
            room,
            settings.frame_limits,
            settings.body_timeout_s,
            settings.max_wait_s,
        )
        app.include_router(routes.router)
        app.include_router(metrics_router(figures.registry))
        threads = ThreadPoolExecutor(_CODEC_THREADS, "split-codec")
        _watch(figures, room, samples)
        figures.registry.register(
            RunCollector(federation.open_runs, figures.of_run, self._meter.run)
        )
        plane = SplitPlane(
            JSONBodyLimit(app, settings.body_timeout_s),
            HandlerContext(
                engine, samples, self.placement.device, federation.files, settings.frame_limits
            ),
            federation,
            self._presence,
            settings.frame_limits,
            room,
            threads,
            SideStreams(self.placement.device),
            settings.body_timeout_s,
        )
        self._app = RequestMiddleware(plane, self._meter, self._credentials)
        ticking = [asyncio.create_task(self._tick(federation, engine))]
        if settings.compile:
            compiling = _Compiling(federation, engine)
            await compiling.prepare()
            ticking.append(asyncio.create_task(compiling.keep_on()))
        log.info("ready: bodies on %s in %s", self.placement.device, self.placement.dtype_name)
        try:
            yield {"meter": self._meter}
        finally:
            for task in ticking:
                task.cancel()
            notifier.close()
            await asyncio.to_thread(federation.close)
            await asyncio.to_thread(engine.close)
            await asyncio.to_thread(threads.shutdown)
            await asyncio.to_thread(samples.close)
            await asyncio.to_thread(federation.save_traffic)
            await asyncio.to_thread(store.close)

    def _engine(self, figures: EngineFigures) -> Engine:
        settings = self.settings
        limits = EngineLimits(
            retained_bytes=settings.engine_memory_mib * _MIB,
            queued_bytes=settings.queue_mib * _MIB,
            response_bytes=settings.answer_mib * _MIB,
            step_timeout_s=settings.step_timeout_s,
            graph_timeout_s=settings.graph_timeout_s,
            steps_per_participant=settings.max_steps,
            max_batch_samples=settings.max_batch_samples,
            max_wait_s=settings.max_wait_ms / 1000,
            backward=settings.backward,
        )
        bodies = BodyCache(self.placement, settings.max_bodies, compiled=settings.compile)
        return Engine(bodies, self.placement, limits, figures=figures, handlers=[TunedBodies])

    def _sample_store(self) -> SampleStore:
        settings = self.settings
        limits = StoreLimits(
            memory_bytes=settings.samples_mib * _MIB,
            disk_bytes=settings.samples_disk_mib * _MIB,
            participant_bytes=settings.participant_samples_mib * _MIB,
            files=descriptor_limit() // 2,
        )
        return SampleStore(settings.data_dir / "samples", limits)

    def _federation(self, store: Store, watcher: _Watcher) -> FederationService:
        settings, clock = self.settings, Clock()
        given = settings.operator_token
        operator = load_operator_token(
            settings.data_dir / OPERATOR_TOKEN_FILE, given.get_secret_value() if given else None
        )
        join = settings.join_token
        self._credentials = Credentials(
            load_secret(settings.data_dir / "secret"),
            operator,
            join.get_secret_value() if join else None,
        )
        self._presence = Liveness(settings.live_window_s, clock)
        federation = FederationService(
            settings.data_dir, store, self._credentials, self._meter, self._presence, watcher, clock
        )
        federation.load()
        return federation

    async def _tick(self, federation: FederationService, engine: Engine) -> None:
        """Notice deadlines, and save now and then what only memory holds."""
        for number in range(1, 2**62):
            await asyncio.sleep(_TICK_S)
            for run in federation.open_runs():
                with _logged(f"run {run} could not go on"):
                    if federation.due(run):
                        await asyncio.to_thread(federation.go_on, run, wait=False)
            if number % _TICKS_PER_SAVE == 0:
                with _logged("what has been left open could not be let go"):
                    engine.sweep()
                with _logged("saving the meter failed"):
                    await asyncio.to_thread(federation.save_traffic)


def _watch(figures: EngineFigures, room: BodyBudget, samples: SampleStore) -> None:
    watch = figures.watch
    watch("sfprompt_requests_bytes", "Bodies of requests that are held", lambda: room.taken)
    watch(
        "sfprompt_samples_memory_bytes", "Smashed data kept in memory", lambda: samples.memory_bytes
    )
    watch("sfprompt_samples_disk_bytes", "Smashed data kept on disk", lambda: samples.disk_bytes)
    ProcessCollector(registry=figures.registry)  # memory and time of the whole server
    if torch.cuda.is_available():
        watch("sfprompt_gpu_bytes", "Memory of the GPU in use", torch.cuda.memory_allocated)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("%s; trying again later", what)


def create_app(settings: ServerSettings) -> SplitServer:
    """A server's application.

    Raises:
        InvalidField: a device that is not there.
    """
    return SplitServer(settings)


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
    with lock_data_dir(settings.data_dir):
        check_complete(settings.data_dir, settings.database)
        Store(settings.database).close()  # a wrong schema is told in one line, not in a traceback
        # A search for cycles in all that was imported takes a fifth of a second: not while serving.
        gc.collect()
        gc.freeze()
        with contextlib.suppress(KeyboardInterrupt):
            build_server(application, settings).run()
