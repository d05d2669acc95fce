"""The server's settings: flags override the environment, a TOML file and the defaults."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from protocol.command import read_token_file
from protocol.errors import InvalidField
from protocol.limits import MIB, FrameLimits
from protocol.nearest import nearest_name
from split_server.engine.limits import BackwardMode

ENV_PREFIX = "SPLIT_SERVER_"

OPERATOR_TOKEN_FILE = "operator.token"  # noqa: S105 - the name of a file in the data folder

# Files that `split-server certs` writes
CERT_FILE, KEY_FILE, CA_FILE = "cert.pem", "key.pem", "ca.pem"
JOIN_TOKEN_FILE = "join.token"  # noqa: S105 - a name

DEFAULT_PORT = 8500

Device = Literal["auto", "cuda", "mps", "cpu"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

LogLevel = Literal["debug", "info", "warning", "error"]

Token = Annotated[SecretStr, Field(min_length=8, max_length=200)]

_file: ContextVar[Mapping[str, Any]] = ContextVar("settings_file")


class ServerSettings(BaseSettings):
    """Every setting of ``split-server serve``."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: all interfaces")
    port: int = Field(
        DEFAULT_PORT, ge=0, le=65_535, description="port to listen on; 0: any free port"
    )
    data_dir: Path = Field(
        Path("sfprompt-data"), description="folder of runs, states and backbones"
    )
    device: Device = Field("auto", description="device of the bodies")
    dtype: DType = Field(
        "auto", description="dtype of the bodies; bfloat16 on a CPU: matrix products only"
    )
    torch_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of torch; none: torch's default"
    )
    max_frame_mib: int = Field(256, ge=1, le=16_384, description="limit of a request's body")
    engine_memory_mib: int = Field(
        4096,
        ge=1,
        le=2**24,
        description="memory for steps between forward and backward, and for tuned bodies",
    )
    max_batch_samples: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="limit of a batch; none: chosen for the device; 1: no batching, "
        "so that results are reproducible bit for bit",
    )
    max_wait_ms: float = Field(
        2.0,
        ge=0,
        le=10_000,
        description="longest wait of a forward for others while the device is idle",
    )
    backward: BackwardMode = Field(
        "auto",
        description="retained: steps keep their graph | recompute: they keep their input and run "
        "forward twice | auto: retained while engine_memory_mib suffices",
    )
    compile: bool = Field(
        False, description="compile bodies with torch.compile, before the first step of a run"
    )
    queue_mib: int = Field(
        512,
        ge=1,
        le=2**20,
        description="memory for requests: bodies, tensors that are decoded, responses; and as much "
        "again for tensors in the queue",
    )
    answer_mib: int = Field(
        256,
        ge=0,
        le=2**20,
        description="responses cached for repeated steps, on the bodies' device",
    )
    samples_mib: int = Field(1024, ge=1, le=2**24, description="smashed data cached in memory")
    samples_disk_mib: int = Field(
        8192, ge=0, le=2**24, description="smashed data cached on disk when memory is full"
    )
    participant_samples_mib: int = Field(
        2048, ge=1, le=2**24, description="smashed data cached for one participant"
    )
    step_timeout_s: float = Field(
        300.0, gt=0, le=86_400, description="a step without its backward is dropped after this time"
    )
    graph_timeout_s: float = Field(
        30.0,
        gt=0,
        le=86_400,
        description="a step without its backward keeps only its input after this time",
    )
    max_steps: int = Field(4, ge=1, le=1024, description="open steps of one participant")
    max_bodies: int = Field(4, ge=1, le=1024, description="frozen bodies in memory")
    body_timeout_s: float = Field(
        120.0, gt=0, le=86_400, description="timeout of receiving one request"
    )
    stall_timeout_s: float = Field(
        10.0,
        gt=0,
        le=86_400,
        description="a request or response is given up if less than 10 KiB of it move in this time",
    )
    live_window_s: float = Field(
        60.0, gt=0, le=86_400, description="a silent participant is not sampled after this time"
    )
    max_wait_s: float = Field(60.0, gt=0, le=600, description="longest long poll")
    max_connections: int = Field(2000, ge=1, le=1_000_000, description="limit of open connections")
    certs: Path | None = Field(
        None,
        description="folder that split-server certs made; stands for tls_cert, tls_key and "
        "join_token_file",
    )
    insecure: bool = Field(
        False,
        description="listen on other than loopback without TLS or without a join token",
    )
    max_address_connections: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="open connections of one address without a valid credential; above it, "
        "the longest idle one is closed",
    )
    max_participant_connections: int = Field(
        32, ge=2, le=1_000_000, description="limit of one participant's open connections"
    )
    first_request_timeout_s: float = Field(
        10.0,
        gt=0,
        le=86_400,
        description="a connection whose first request is not complete is closed after this time, "
        "unless the request has a valid credential",
    )
    operator_token: Token | None = Field(
        None, description="none: created, in DATA_DIR/operator.token"
    )
    operator_token_file: Path | None = Field(
        None, description="file with the operator token, which no list of processes shows"
    )
    join_token: Token | None = Field(None, description="none: anyone may join")
    join_token_file: Path | None = Field(
        None, description="file with the join token, which no list of processes shows"
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the certificate; needs tls_key; serves https"
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key")
    log_level: LogLevel = Field("info", description="least severe messages to log")

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Put the files of the folder `certs`, and the tokens in files, where they belong."""
        values = dict(values)
        if isinstance(certs := values.get("certs"), (str, Path)):
            own = {"tls_cert": CERT_FILE, "tls_key": KEY_FILE}
            if values.get("join_token") is None:
                own["join_token_file"] = JOIN_TOKEN_FILE
            values = {name: Path(certs) / file for name, file in own.items()} | values
        for name in ("operator_token", "join_token"):
            if isinstance(file := values.get(f"{name}_file"), (str, Path)):
                if values.get(name) is not None:
                    raise ValueError(f"set {name} or {name}_file, not both")
                values[name] = read_token_file(Path(file), f"{name}_file")
        return values

    @model_validator(mode="after")
    def _check_exposure(self) -> ServerSettings:
        if self.exposed and not self.insecure:
            raise ValueError(
                f"others can reach {self.host}, and the server lacks {' and '.join(self.exposed)}: "
                "make both with `split-server certs --host NAME --out certs` and add "
                "`--certs certs`; or add `--insecure`, on a network that is yours alone"
            )
        return self

    @model_validator(mode="after")
    def _check_tls_pair(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("set both tls_cert and tls_key, or neither")
        return self

    @model_validator(mode="after")
    def _check_tls_files(self) -> ServerSettings:
        for name in ("tls_cert", "tls_key"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: the file {path} does not exist")
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> ServerSettings:
        if self.join_token is not None and self.join_token == self.operator_token:
            raise ValueError("join_token must differ from operator_token")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources by priority: flags, environment, the TOML file being loaded."""
        from_file = InitSettingsSource(settings_cls, init_kwargs=dict(_file.get({})))
        return init_settings, env_settings, from_file

    @property
    def exposed(self) -> list[str]:
        """What a server that others can reach lacks; empty: nothing."""
        if is_loopback(self.host):
            return []
        lacking = {"TLS": self.tls_cert is None, "a join token": self.join_token is None}
        return [name for name, is_lacking in lacking.items() if is_lacking]

    @cached_property
    def frame_limits(self) -> FrameLimits:
        """The limits of a request's frame."""
        return FrameLimits(max_frame_bytes=self.max_frame_mib * MIB)

    @property
    def request_bodies_bytes(self) -> int:
        """Memory budget of the request bodies that are being received or processed."""
        return self.queue_mib * MIB

    @property
    def engine_queue_bytes(self) -> int:
        """Memory budget of the decoded tensors in the engine's queue."""
        return self.queue_mib * MIB

    @property
    def database(self) -> Path:
        """The SQLite file of runs, rounds and participants."""
        return self.data_dir / "server.sqlite"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(
    flags: Mapping[str, Any] | None = None, file: Path | None = None
) -> ServerSettings:
    """Load the settings from flags, the environment and a TOML file.

    Raises:
        InvalidField: the file cannot be read, or a setting is invalid. Names the setting, its limit
            and value, and the source that it came from.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    content = read_toml(file) if file is not None else {}
    _check_environment()
    token = _file.set(content)
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        raise _explain(error, given, content, file) from None
    finally:
        _file.reset(token)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of settings.

    Raises:
        InvalidField: the file cannot be read, or is not TOML in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(
            "the settings file cannot be read as UTF-8", field="config", value=str(error)
        ) from error
    return parse_toml(text, str(path))


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Parse settings in TOML.

    Args:
        text: the settings.
        source: where they come from, for errors.

    Raises:
        InvalidField: the text is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidField(
            f"{source} is not valid TOML ({error})", field="config", value=source
        ) from error


def _check_environment() -> None:
    """Refuse a misspelt variable; others of this prefix may belong to somebody else.

    Raises:
        InvalidField: the environment has a variable whose name is nearly a setting's.
    """
    for variable in sorted(_environment()):
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name == variable.lower() or name in ServerSettings.model_fields:
            continue
        if (meant := nearest_name(name, ServerSettings.model_fields)) is not None:
            raise InvalidField(
                f"there is no setting {name}",
                field=variable,
                hint=f"did you mean {ENV_PREFIX}{meant.upper()}? else unset it",
            )


def _explain(
    error: ValidationError, flags: Mapping[str, Any], content: Mapping[str, Any], file: Path | None
) -> InvalidField:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if not name:
        return InvalidField(str(first["msg"]).removeprefix("Value error, "), field="settings")
    flag = "--" + name.replace("_", "-")
    if name in flags:
        source = f"it came from {flag}"
    elif name in content and ENV_PREFIX + name.upper() not in _environment():
        source = f"it came from {file}"
    else:
        source = f"it came from {ENV_PREFIX}{name.upper()}"
    secret = name.endswith("_token")
    value = first.get("input")
    shown = value if isinstance(value, (str, int, float)) and not secret else None
    if first["type"] == "extra_forbidden":
        meant = nearest_name(name, ServerSettings.model_fields)
        return InvalidField(
            f"there is no setting {name}",
            field=name,
            limit=None if meant else sorted(ServerSettings.model_fields),
            hint=f"did you mean {meant}? {source}" if meant else source,
        )
    return InvalidField(f"{name}: {first['msg']}", field=name, value=shown, hint=source)


def _environment() -> set[str]:
    return {key.upper() for key in os.environ}
