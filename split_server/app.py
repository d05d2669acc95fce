"""Assemble the server: build its services, compose the ASGI application, and serve it."""

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
from torch import Tensor

from split_server.address import write_address
from split_server.closed_form.start import ClosedFormStarts
from split_server.engine.body_cache import BodyCache
from split_server.engine.engine import Engine
from split_server.engine.limits import EngineLimits
from split_server.engine.metrics import EngineFigures
from split_server.federation.advance import RunAdvancer
from split_server.federation.control import RunControl
from split_server.federation.credentials import Credentials, load_operator_token, load_secret
from split_server.federation.liveness import Liveness
from split_server.federation.presence import Presence
from split_server.federation.reader import RunReader
from split_server.federation.removals import Removals
from split_server.federation.runs import RunRegistry
from split_server.federation.service import FederationService
from split_server.federation.state import RunStates
from split_server.http.audit import AUDIT_FILE, AuditLog
from split_server.http.budget import BodyBudget
from split_server.http.connection import CONNECTIONS_KEY, STALL_KEY, MeteredProtocol
from split_server.http.connections import ConnectionLimits, ConnectionTable
from split_server.http.errors import add_error_handlers
from split_server.http.federation_routes import FederationRoutes
from split_server.http.metrics import RunCollector, metrics_router
from split_server.http.middleware import JSONBodyLimit, RequestMiddleware
from split_server.http.operator_routes import OperatorRoutes
from split_server.http.rights import Guard, list_routes, require_rows
from split_server.http.services import Services
from split_server.http.split_plane import ROUTES, SplitPlane
from split_server.method import list_job_handlers
from split_server.models.body_key import BodyKey
from split_server.page.routes import PageRoutes
from split_server.page.session import Sessions
from split_server.runtime.aio import Notifier
from split_server.runtime.device import Placement, SideStreams, choose_placement
from split_server.runtime.listening import check_address
from split_server.runtime.process import Clock, descriptor_limit
from split_server.settings import OPERATOR_TOKEN_FILE, ServerSettings
from split_server.shared_labels.body_jobs import OwnBodies
from split_server.shared_labels.receipt import LabelReceipt
from split_server.shared_labels.stand_in import StandIns
from split_server.storage.data_dir import check_complete, lock_data_dir
from split_server.storage.database import Store
from split_server.storage.sample_store import SampleStore, StoreLimits
from split_server.storage.traffic import Meter

log = logging.getLogger(__name__)

_MIB = 1024 * 1024

_CODEC_THREADS = 8  # decode and encode frames

_KEEP_ALIVE_S = 120  # longer than a device's long poll

_TICK_S = 0.25  # the longest delay until a deadline is noticed

_TICKS_PER_SAVE = 4  # of the meter: a killed server loses at most the counts of a second

_TICKS_PER_SWEEP = 20  # of abandoned steps


@dataclass(frozen=True)
class _EngineLink:
    """Connects the federation to the engine, the sample store and the long polls."""

    notifier: Notifier
    engine: Engine
    samples: SampleStore

    def changed(self, run_id: str) -> None:
        self.notifier.notify(run_id)

    def round_over(self, run_id: str) -> None:
        self.engine.release(run_id)
        self.notifier.notify(run_id)

    def run_over(self, run_id: str) -> None:
        self.samples.drop(run_id)
        self.engine.forget(run_id)

    def left(self, run_id: str, participant_id: str) -> None:
        self.engine.release(run_id, participant_id)
        self.samples.drop(run_id, participant_id)
        self.notifier.notify(run_id)

    def update_settled(self, run_id: str, participant_id: str) -> None:
        self.engine.release(run_id, participant_id)

    def work(self, run_id: str) -> Mapping[str, float]:
        figures = self.engine.figures(run_id)
        return figures.to_dict() if figures.tasks else {}

    def trained_state(self, run_id: str, participant_id: str, session: str) -> dict[str, Tensor]:
        return self.engine.trained_state(run_id, participant_id, session)


def build_services(
    settings: ServerSettings, placement: Placement, meter: Meter, notifier: Notifier
) -> Services:
    """Open the database and the stores, start the engine, and load all runs. Blocks."""
    clock = Clock()
    store = Store(settings.database)
    figures = EngineFigures()
    engine = _build_engine(settings, placement, figures)
    samples = _build_sample_store(settings)
    link = _EngineLink(notifier, engine, samples)
    credentials = _build_credentials(settings)
    liveness = Liveness(settings.live_window_s, clock)
    runs = RunRegistry(settings.data_dir, store, meter, link, clock)
    advancer = RunAdvancer(runs, liveness)
    runs.load()
    starts = ClosedFormStarts(runs, engine, samples, placement.device, settings.max_wait_s)
    federation = FederationService(runs, advancer, credentials, liveness, link)
    labels = LabelReceipt(runs, advancer, samples)
    return Services(
        settings=settings,
        placement=placement,
        engine=engine,
        figures=figures,
        samples=samples,
        labels=labels,
        stand_ins=StandIns(runs, federation, starts, labels, engine, placement.device),
        starts=starts,
        store=store,
        meter=meter,
        credentials=credentials,
        sessions=Sessions(clock.monotonic),
        liveness=liveness,
        runs=runs,
        advancer=advancer,
        federation=federation,
        reader=RunReader(runs, liveness),
        removals=Removals(runs, advancer, liveness),
        control=RunControl(runs, advancer),
        states=RunStates(runs, liveness, engine),
        presence=Presence(runs, liveness),
        notifier=notifier,
        body_budget=BodyBudget(settings.request_bodies_bytes, engine.busy_error),
        audit=AuditLog(settings.data_dir / AUDIT_FILE, clock.wall),
        codec_threads=ThreadPoolExecutor(_CODEC_THREADS, "split-codec"),
        codec_streams=SideStreams(placement.device),
    )


def _build_engine(settings: ServerSettings, placement: Placement, figures: EngineFigures) -> Engine:
    limits = EngineLimits(
        retained_bytes=settings.engine_memory_mib * _MIB,
        queued_bytes=settings.engine_queue_bytes,
        response_bytes=settings.answer_mib * _MIB,
        step_timeout_s=settings.step_timeout_s,
        graph_timeout_s=settings.graph_timeout_s,
        steps_per_participant=settings.max_steps,
        max_batch_samples=settings.max_batch_samples,
        max_wait_s=settings.max_wait_ms / 1000,
        backward=settings.backward,
    )
    bodies = BodyCache(placement, settings.max_bodies, compiled=settings.compile)
    return Engine(
        bodies, placement, limits, figures=figures, handlers=[*list_job_handlers(), OwnBodies]
    )


def _build_sample_store(settings: ServerSettings) -> SampleStore:
    limits = StoreLimits(
        memory_bytes=settings.samples_mib * _MIB,
        disk_bytes=settings.samples_disk_mib * _MIB,
        participant_bytes=settings.participant_samples_mib * _MIB,
        files=descriptor_limit() // 2,
    )
    return SampleStore(settings.data_dir / "samples", limits)


def _build_credentials(settings: ServerSettings) -> Credentials:
    operator, join = settings.operator_token, settings.join_token
    return Credentials(
        load_secret(settings.data_dir / "secret"),
        load_operator_token(
            settings.data_dir / OPERATOR_TOKEN_FILE,
            operator.get_secret_value() if operator else None,
        ),
        join.get_secret_value() if join else None,
    )


async def _close_services(services: Services) -> None:
    """Close in the reverse order of use: requests, runs, engine, codecs, stores."""
    services.notifier.close()
    for close in (
        services.advancer.close,
        services.stand_ins.close,
        services.starts.close,
        services.engine.close,
        services.codec_threads.shutdown,
        services.samples.close,
        services.runs.save_traffic,
        services.store.close,
        services.audit.close,
    ):
        await asyncio.to_thread(close)


def _add_metrics(services: Services) -> None:
    figures, samples = services.figures, services.samples
    watch = figures.watch
    watch(
        "sfprompt_requests_bytes",
        "Memory of requests: bodies, decoded tensors and responses",
        lambda: services.body_budget.taken,
    )
    watch(
        "sfprompt_samples_memory_bytes", "Smashed data kept in memory", lambda: samples.memory_bytes
    )
    watch("sfprompt_samples_disk_bytes", "Smashed data kept on disk", lambda: samples.disk_bytes)
    ProcessCollector(registry=figures.registry)  # memory and time of the whole server
    if torch.cuda.is_available():
        watch("sfprompt_gpu_bytes", "Memory of the GPU in use", torch.cuda.memory_allocated)
    figures.registry.register(
        RunCollector(
            services.runs.open_runs,
            figures.of_run,
            services.meter.run,
            lambda run: services.runs.refusals[run],
        )
    )


@dataclass(frozen=True)
class _Compiler:
    """Compiles the bodies of open runs before their first step."""

    services: Services
    ready: set[BodyKey] = field(default_factory=set)

    async def compile_open_runs(self) -> None:
        """Compile the frozen bodies of the runs that are open now."""
        for run_id in self.services.runs.open_runs():
            run = self.services.runs.snapshot(run_id)
            if run.method.has_tuned_bodies(run.plan) or run.body in self.ready:
                continue
            self.ready.add(run.body)
            with _logged(f"run {run_id}: its body could not be compiled in advance"):
                await asyncio.to_thread(self.services.engine.prepare, run.body)

    async def watch(self) -> None:
        """Compile the bodies of runs that are created from now on."""
        while True:
            await asyncio.sleep(_TICK_S)
            with _logged("bodies could not be compiled in advance"):
                await self.compile_open_runs()


async def _tick(services: Services) -> None:
    """Notice deadlines, save the meter, and free abandoned steps from time to time."""
    for tick in range(1, 2**62):
        await asyncio.sleep(_TICK_S)
        for run_id in services.runs.open_runs():
            with _logged(f"run {run_id} could not be advanced"):
                if services.advancer.is_due(run_id):
                    await asyncio.to_thread(services.advancer.try_advance, run_id, wait=False)
                if services.presence.has_changed(run_id):
                    await asyncio.to_thread(services.presence.note, run_id)
        if tick % _TICKS_PER_SAVE == 0:
            with _logged("the traffic could not be saved"):
                await asyncio.to_thread(services.runs.save_traffic)
        if tick % _TICKS_PER_SWEEP == 0:
            with _logged("abandoned steps could not be freed"):
                services.engine.sweep()
            with _logged("finished starts could not be freed"):
                await asyncio.to_thread(services.starts.sweep)


@contextlib.contextmanager
def _logged(failure: str) -> Iterator[None]:
    """Log an exception instead of raising it."""
    try:
        yield
    except Exception:
        log.exception("%s; retrying later", failure)


class SplitServer:
    """The ASGI application. It opens its services at startup and closes them at shutdown."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.placement = choose_placement(settings.device, settings.dtype)
        self.services: Services | None = None  # None: before startup
        self._fastapi = FastAPI(lifespan=self._lifespan, openapi_url=None)  # no pages of its own
        add_error_handlers(self._fastapi)
        self._meter = Meter()
        self._app: Any = RequestMiddleware(self._fastapi, self._meter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def stop_waiting(self) -> None:
        """Answer all long polls now: the server is about to stop."""
        if self.services is not None:
            self.services.notifier.close()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        settings = self.settings
        if settings.torch_threads is not None:
            torch.set_num_threads(settings.torch_threads)
        notifier = Notifier(asyncio.get_running_loop())
        self.services = services = await asyncio.to_thread(
            build_services, settings, self.placement, self._meter, notifier
        )
        self._app = _compose(app, services)
        connections = ConnectionTable(_connection_limits(settings))
        services.figures.watch("sfprompt_connections", "Open connections", lambda: len(connections))
        tasks = [asyncio.create_task(_tick(services)), asyncio.create_task(connections.watch())]
        tasks.append(asyncio.create_task(services.stand_ins.watch()))
        if settings.compile:
            compiler = _Compiler(services)
            await compiler.compile_open_runs()
            tasks.append(asyncio.create_task(compiler.watch()))
        log.info("ready: bodies on %s in %s", self.placement.device, self.placement.dtype_name)
        try:
            yield {
                "meter": self._meter,
                STALL_KEY: settings.stall_timeout_s,
                CONNECTIONS_KEY: connections,
            }
        finally:
            for task in tasks:
                task.cancel()
            await _close_services(services)


def _connection_limits(settings: ServerSettings) -> ConnectionLimits:
    return ConnectionLimits(
        total=settings.max_connections,
        per_address=settings.max_address_connections,
        per_participant=settings.max_participant_connections,
        first_request_s=settings.first_request_timeout_s,
        idle_s=_KEEP_ALIVE_S,
    )


def _compose(app: FastAPI, services: Services) -> RequestMiddleware:
    """Put the routes and the middleware together."""
    routes = FederationRoutes(services)
    metrics = metrics_router(services.figures.registry)
    operator, page = OperatorRoutes(services).router, PageRoutes(services).router
    for router in (routes.router, operator, page, metrics):
        app.router.routes.extend(router.routes)
    require_rows([*list_routes(app.routes), *(("POST", path) for path in ROUTES)])
    _add_metrics(services)
    timeout_s = services.settings.body_timeout_s
    json_limit = JSONBodyLimit(app, timeout_s, is_exempt=routes.limits_body_itself)
    is_open = services.credentials.is_open
    guard = Guard(SplitPlane(json_limit, services), services.runs, is_open)
    return RequestMiddleware(
        guard, services.meter, services.credentials, services.audit, services.sessions
    )


def create_app(settings: ServerSettings) -> SplitServer:
    """Create a server's application.

    Raises:
        InvalidField: the device is not available.
    """
    return SplitServer(settings)


_GRACE_S = 10  # for requests in progress when the server stops


class Server(uvicorn.Server):
    """uvicorn's server, which ends long polls when it shuts down."""

    def __init__(self, config: uvicorn.Config, application: SplitServer) -> None:
        super().__init__(config)
        self._application = application

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer all long polls, then shut down."""
        self._application.stop_waiting()
        await super().shutdown(sockets)


def build_server(application: SplitServer, settings: ServerSettings) -> Server:
    """Build a uvicorn server for the application."""
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
        proxy_headers=False,  # the client's address is not used
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    return Server(config, application)


def serve_until_stopped(application: SplitServer, settings: ServerSettings) -> None:
    """Lock the data folder and serve until a signal arrives.

    Raises:
        InvalidField: the folder is in use, cannot be used, or belongs to another release; or the
            address cannot be listened on.
    """
    check_address(settings.host, settings.port)
    with lock_data_dir(settings.data_dir):
        check_complete(settings.data_dir, settings.database)
        Store(settings.database).close()  # reports a wrong schema in one line, not in a traceback
        write_address(settings)
        # Garbage collection over all imported modules takes a fifth of a second. Freezing them
        # excludes them from every collection while serving.
        gc.collect()
        gc.freeze()
        with contextlib.suppress(KeyboardInterrupt):
            build_server(application, settings).run()
