"""How the server is set up: flags over environment over a TOML file over defaults."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from protocol.errors import InvalidField
from protocol.limits import MIB, FrameLimits
from split_server.engine.limits import BackwardMode

ENV_PREFIX = "SPLIT_SERVER_"

OPERATOR_TOKEN_FILE = "operator.token"  # noqa: S105 - the name of a file in the data folder

DEFAULT_PORT = 8500

Device = Literal["auto", "cuda", "mps", "cpu"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

LogLevel = Literal["debug", "info", "warning", "error"]

Token = Annotated[SecretStr, Field(min_length=8, max_length=200)]

_file: ContextVar[Mapping[str, Any]] = ContextVar("settings_file")


class ServerSettings(BaseSettings):
    """Every setting of ``split-server serve``."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: all")
    port: int = Field(DEFAULT_PORT, ge=0, le=65_535, description="0: any free one")
    data_dir: Path = Field(Path("sfprompt-data"), description="runs, states and backbones")
    device: Device = Field("auto", description="where the bodies run")
    dtype: DType = Field(
        "auto", description="what bodies compute in; bfloat16 on a CPU: matrix products alone"
    )
    torch_threads: int | None = Field(None, ge=1, le=1024, description="none: torch's choice")
    max_frame_mib: int = Field(256, ge=1, le=16_384, description="largest body of a request")
    engine_memory_mib: int = Field(
        4096,
        ge=1,
        le=2**24,
        description="what split steps keep between forward and backward, and bodies that are tuned",
    )
    max_batch_samples: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="computed together; none: what the device gains from; 1: each job by itself, "
        "so that runs repeat bit for bit",
    )
    max_wait_ms: float = Field(
        2.0, ge=0, le=10_000, description="a forward waits for others while the device is idle"
    )
    backward: BackwardMode = Field(
        "auto",
        description="retained: steps keep their graph | recompute: their input, forward runs twice "
        "| auto: their graph while engine_memory_mib lasts",
    )
    compile: bool = Field(
        False, description="compile bodies with torch.compile, those of open runs ahead"
    )
    queue_mib: int = Field(512, ge=1, le=2**20, description="tensors being read or waiting")
    answer_mib: int = Field(
        256, ge=0, le=2**20, description="answers kept for repeated steps, where bodies run"
    )
    samples_mib: int = Field(
        1024, ge=1, le=2**24, description="smashed data kept in memory for later steps"
    )
    samples_disk_mib: int = Field(
        8192, ge=0, le=2**24, description="the same on disk, where memory is full"
    )
    participant_samples_mib: int = Field(
        2048, ge=1, le=2**24, description="the same, most for one participant"
    )
    step_timeout_s: float = Field(
        300.0, gt=0, le=86_400, description="a step without its backward is dropped after this"
    )
    graph_timeout_s: float = Field(
        30.0, gt=0, le=86_400, description="a step keeps its input alone after this, if not before"
    )
    max_steps: int = Field(4, ge=1, le=1024, description="open steps of one participant")
    max_bodies: int = Field(4, ge=1, le=1024, description="frozen bodies held at once")
    body_timeout_s: float = Field(120.0, gt=0, le=86_400, description="to receive one request")
    live_window_s: float = Field(
        60.0, gt=0, le=86_400, description="a silent participant is not drawn after this"
    )
    max_wait_s: float = Field(60.0, gt=0, le=600, description="longest long poll")
    max_connections: int = Field(2000, ge=1, le=1_000_000, description="open at once")
    operator_token: Token | None = Field(None, description="none: made, in DATA_DIR/operator.token")
    join_token: Token | None = Field(None, description="none: everybody may join")
    tls_cert: Path | None = Field(None, description="PEM file; with tls_key: https")
    tls_key: Path | None = None
    log_level: LogLevel = "info"

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or neither")
        return self

    @model_validator(mode="after")
    def _tls_files_are_there(self) -> ServerSettings:
        for name in ("tls_cert", "tls_key"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: there is no file {path}")
        return self

    @model_validator(mode="after")
    def _tokens_differ(self) -> ServerSettings:
        if self.join_token is not None and self.join_token == self.operator_token:
            raise ValueError("join_token must not be the operator_token")
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
        """Flags, then the environment, then the TOML file that is being loaded."""
        from_file = InitSettingsSource(settings_cls, init_kwargs=dict(_file.get({})))
        return init_settings, env_settings, from_file

    @property
    def frame_limits(self) -> FrameLimits:
        return FrameLimits(max_frame_bytes=self.max_frame_mib * MIB)

    @property
    def database(self) -> Path:
        return self.data_dir / "server.sqlite"


def load_settings(
    flags: Mapping[str, Any] | None = None, file: Path | None = None
) -> ServerSettings:
    """The settings from flags (those given), the environment and a TOML file.

    Raises:
        InvalidField: the file cannot be read, or a setting is wrong; it names the setting, its
            limit, what was found, and where it can be set.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    content = _read_toml(file) if file is not None else {}
    token = _file.set(content)
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        raise _explain(error, given, content, file) from None
    finally:
        _file.reset(token)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidField(
            "the settings file cannot be read", field="config", value=str(error)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidField(
            f"{path} is not valid TOML ({error})", field="config", value=str(path)
        ) from error


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
        return InvalidField(
            f"there is no setting {name}",
            field=name,
            limit=sorted(ServerSettings.model_fields),
            hint=source,
        )
    return InvalidField(f"{name}: {first['msg']}", field=name, value=shown, hint=source)


def _environment() -> set[str]:
    return {key.upper() for key in os.environ}
