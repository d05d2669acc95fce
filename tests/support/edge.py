"""Doubles for the device's tests: a raw socket server, a small model, and a body server."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.torch_model import TorchModel, wire_shape
from edge_client.training import RoundContext, Samples
from edge_client.transport.client import Server
from edge_client.transport.retry import RetryPolicy
from edge_client.transport.split_client import SplitPlane
from protocol.errors import StepLost
from protocol.frames import Frame, decode_frame, encode_frame, join_frame
from protocol.messages import BlobRef
from protocol.plan import ModelPlan, RunPlan, TrainingPlan
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.head_file import write_head_file
from split_model.checkpoints.state import device_shapes, initial_state, save_state
from split_model.files import sha256_of
from split_model.parts.build import build_body

CACHE_BYTES = 2**28


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class Connection:
    """An accepted connection: parses requests, sends raw bytes, and counts both."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.received = self.sent = 0
        self._unread = b""

    def receive(self) -> bytes:
        data = self.raw.recv(1 << 16)
        self.received += len(data)
        return data

    def request(self) -> Request | None:
        """Receive the next request; None: the client has closed the connection."""
        while b"\r\n\r\n" not in self._unread:
            data = self.receive()
            if not data:
                return None
            self._unread += data
        head, self._unread = self._unread.split(b"\r\n\r\n", 1)
        first, *lines = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {n.lower(): v for n, v in (line.split(": ", 1) for line in lines)}
        body = bytearray(self._unread)
        length = int(headers.get("content-length", 0))
        while len(body) < length:
            body += self.receive()
        self._unread = bytes(body[length:])
        return Request(method, target, headers, bytes(body[:length]))

    def send(self, data: bytes) -> None:
        self.sent += len(data)  # counted first: the client may be faster than this thread
        self.raw.sendall(data)

    def reset(self) -> None:
        """Close with RST, as a restarted host does."""
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.raw.close()


def response(body: bytes = b"", status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class RawServer:
    """Runs ``serve`` on every connection, each in a thread; its errors fail the test."""

    def __init__(
        self, serve: Callable[[Connection], None], tls: ssl.SSLContext | None = None
    ) -> None:
        self._serve, self._tls = serve, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.connections: list[Connection] = []
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def received(self) -> int:
        return sum(connection.received for connection in self.connections)

    @property
    def sent(self) -> int:
        return sum(connection.sent for connection in self.connections)

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            _shut(connection.raw)
        for thread in self._threads:
            thread.join(5)
        if self.errors:
            raise self.errors[0]

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._run, args=(raw,))
            self._threads.append(thread)
            thread.start()

    def _run(self, raw: socket.socket) -> None:
        connection = Connection(raw)
        self.connections.append(connection)
        try:
            if self._tls is not None:
                connection.raw = self._tls.wrap_socket(raw, server_side=True)
            self._serve(connection)
        except OSError:
            pass  # the client closed the connection, or the test is over
        except BaseException as error:  # raised by __exit__
            self.errors.append(error)
        finally:
            connection.raw.close()


def _shut(raw: socket.socket) -> None:
    with contextlib.suppress(OSError):
        raw.shutdown(socket.SHUT_RDWR)


def answering(answer: Callable[[Request], bytes]) -> Callable[[Connection], None]:
    """Return a ``serve`` that keeps connections alive and answers each request."""

    def serve(connection: Connection) -> None:
        while (request := connection.request()) is not None:
            connection.send(answer(request))

    return serve


class Recorder:
    """Answers each request with the next response; the last response is repeated."""

    def __init__(self, *responses: bytes | Callable[[Request], bytes]) -> None:
        self.responses, self.requests = list(responses), []

    def __call__(self, connection: Connection) -> None:
        def respond(request: Request) -> bytes:
            self.requests.append(request)
            answer = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
            return answer if isinstance(answer, bytes) else answer(request)

        answering(respond)(connection)


def as_json(message: object, status: str = "200 OK", *headers: str) -> bytes:
    return response(json.dumps(message).encode(), status, *headers)


NO_PATIENCE = RetryPolicy(patience_s=0)


def impatient(server: RawServer, **more: object) -> Server:
    return Server(server.url, retry=NO_PATIENCE, response_timeout_s=5, **more)


SMALL = ModelPlan(
    backbone="test_vit",
    weights="random:0",
    image_size=32,
    cut=1,
    num_classes=3,
    prompt_count=4,
)

CLASSES = ("red", "green", "blue")


@dataclass(frozen=True)
class Files:
    backbone: Path
    head: Path
    state: Path

    def ref(self, file: Path) -> BlobRef:
        return BlobRef(sha256=sha256_of(file), nbytes=file.stat().st_size)


def files(model: ModelPlan = SMALL) -> Files:
    """Write the server's files for a small, untrained vision transformer; once per model."""
    return _files(model)


@functools.cache
def _files(model: ModelPlan) -> Files:
    folder = Path(tempfile.mkdtemp(prefix="sfprompt-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = model
    backbone = prepare_backbone(settings, model.weights, folder).path
    head, _ = write_head_file(settings, backbone, folder / "head.safetensors")
    state = initial_state(settings, open_backbone(backbone), seed=1)
    device = {name: state[name] for name in device_shapes(settings)}
    save_state(device, folder / "state.safetensors")
    return Files(backbone, head, folder / "state.safetensors")


def device_model(model: ModelPlan = SMALL) -> TorchModel:
    run_files = files(model)
    return TorchModel.load(model, run_files.head, run_files.state)


def image_set(samples: int = 10, seed: int = 0) -> ImageSet:
    """Make noisy images of three colours, 40 x 40 pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    pixels = torch.randint(0, 120, (samples, 3, 40, 40), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(samples), labels] += 100
    return ImageSet(ArrayStore(pixels.numpy()), labels.numpy(), CLASSES)


def round_context(
    model: TorchModel | None = None,
    *,
    samples: int = 10,
    round_: int = 1,
    name: str = "device",
    model_settings: ModelPlan = SMALL,
    advance: Callable[[str, int, int], None] = lambda *_: None,
    **training: Any,
) -> RoundContext:
    model = model or device_model()
    settings = RunPlan(
        seed=5,
        model=model_settings,
        training=TrainingPlan.model_validate({"batch_size": 4, **training}),
    )
    reader = BatchReader(image_set(samples), model.preprocessing)
    return RoundContext(settings, name, round_, 0, model, Samples(reader), advance, CACHE_BYTES)


@dataclass
class BodyServer:
    """The split plane's part of `edge_client.transport.Server`, with a real body in this process.

    Requests and responses are encoded as frames, as on the wire.
    """

    model: ModelPlan = SMALL
    lose: int = 0  # number of steps that are lost before their backward
    calls: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tensors = open_backbone(files(self.model).backbone)
        self._body = build_body(self.model, tensors)
        self._retained: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def plane(self) -> SplitPlane:
        """Return the split plane of a run with this server."""
        return SplitPlane(self, RunPlan(model=self.model), wire_shape(self.model, False))

    def send_frame(
        self,
        path: str,
        kind: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, tuple[Tensor, str]],
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> Frame:
        assert path == f"/v1/split/{kind}"
        assert not any(getattr(tensor, "requires_grad", False) for tensor, _ in tensors.values())
        sent = _over_the_wire(kind, meta, tensors, generators)
        self.calls.append(kind)
        answers = {"forward": self.forward, "backward": self.backward, "infer": self.infer}
        (tensor,) = sent.tensors().values()
        answer = answers[kind](tensor, step=sent.meta["step"], round_=sent.meta["round"])
        name = "gradients" if kind == "backward" else "features"
        return _over_the_wire(name, meta, {name: (answer, "float32")})

    def forward(self, smashed: Tensor, *, step: str, round_: int) -> Tensor:
        assert step not in self.steps, "each step needs a new name"
        self.steps.append(step)
        inputs = smashed.clone().requires_grad_()
        features = self._body(inputs)
        self._retained[step] = (inputs, features)
        return features.detach().clone()

    def backward(self, gradients: Tensor, *, step: str, round_: int) -> Tensor:
        inputs, features = self._retained.pop(step)
        if self.lose:
            self.lose -= 1
            raise StepLost("the step is gone")
        (gradient,) = torch.autograd.grad(features, inputs, gradients)
        return gradient

    def infer(self, smashed: Tensor, *, step: str, round_: int) -> Tensor:
        with torch.no_grad():
            return self._body(smashed)


def _over_the_wire(
    kind: str,
    meta: Mapping[str, Any],
    tensors: Mapping[str, tuple[Tensor, str]],
    generators: Mapping[str, torch.Generator] | None = None,
) -> Frame:
    return decode_frame(join_frame(encode_frame(kind, meta, tensors, generators=generators)))
