"""The services of a running server that the routes share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from split_server.closed_form.start import ClosedFormStarts
from split_server.engine.engine import Engine
from split_server.engine.metrics import EngineFigures
from split_server.federation.advance import RunAdvancer
from split_server.federation.control import RunControl
from split_server.federation.credentials import Credentials
from split_server.federation.liveness import Liveness
from split_server.federation.presence import Presence
from split_server.federation.reader import RunReader
from split_server.federation.removals import Removals
from split_server.federation.runs import RunRegistry
from split_server.federation.service import FederationService
from split_server.federation.state import RunStates
from split_server.http.audit import AuditLog
from split_server.http.budget import BodyBudget
from split_server.page.session import Sessions
from split_server.runtime.aio import Notifier
from split_server.runtime.device import Placement, SideStreams
from split_server.settings import ServerSettings
from split_server.shared_labels.receipt import LabelReceipt
from split_server.shared_labels.stand_in import StandIns
from split_server.storage.database import Store
from split_server.storage.sample_store import SampleStore
from split_server.storage.traffic import Meter


@dataclass(frozen=True)
class Services:
    """The services; `split_server.app.build_services` creates them at the server's start."""

    settings: ServerSettings
    placement: Placement  # device and dtype of the bodies
    engine: Engine
    figures: EngineFigures
    samples: SampleStore
    labels: LabelReceipt
    stand_ins: StandIns
    starts: ClosedFormStarts
    store: Store
    meter: Meter
    credentials: Credentials
    sessions: Sessions
    liveness: Liveness
    runs: RunRegistry
    advancer: RunAdvancer
    federation: FederationService
    reader: RunReader
    removals: Removals
    control: RunControl
    states: RunStates
    presence: Presence
    notifier: Notifier
    body_budget: BodyBudget
    audit: AuditLog
    codec_threads: ThreadPoolExecutor  # decode and encode frames
    codec_streams: SideStreams  # CUDA streams of these threads
