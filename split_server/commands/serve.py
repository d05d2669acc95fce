"""The subcommand ``split-server serve``; each setting of the server is an option."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from protocol.limits import MIB
from split_server.runtime.process import private_files, set_up_logging
from split_server.settings import ServerSettings, load_settings


def _described(name: str) -> Any:
    """Create an option of ``serve`` from a setting's description; its value is None if unset."""
    setting = ServerSettings.model_fields[name]
    default = setting.get_default(call_default_factory=True)
    text = setting.description or name.replace("_", " ")
    choices = get_args(setting.annotation) if get_origin(setting.annotation) is Literal else ()
    shown = "" if default is None else f" Default: {default}."
    return typer.Option(
        help=text[0].upper() + text[1:] + "." + shown,
        show_default=False,
        metavar="<" + "|".join(choices) + ">" if choices else None,
    )


def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    host: Annotated[str | None, _described("host")] = None,
    port: Annotated[int | None, _described("port")] = None,
    data_dir: Annotated[Path | None, _described("data_dir")] = None,
    device: Annotated[str | None, _described("device")] = None,
    dtype: Annotated[str | None, _described("dtype")] = None,
    torch_threads: Annotated[int | None, _described("torch_threads")] = None,
    max_frame_mib: Annotated[int | None, _described("max_frame_mib")] = None,
    engine_memory_mib: Annotated[int | None, _described("engine_memory_mib")] = None,
    max_batch_samples: Annotated[int | None, _described("max_batch_samples")] = None,
    max_wait_ms: Annotated[float | None, _described("max_wait_ms")] = None,
    backward: Annotated[str | None, _described("backward")] = None,
    compile: Annotated[bool | None, _described("compile")] = None,  # noqa: A002
    queue_mib: Annotated[int | None, _described("queue_mib")] = None,
    answer_mib: Annotated[int | None, _described("answer_mib")] = None,
    samples_mib: Annotated[int | None, _described("samples_mib")] = None,
    samples_disk_mib: Annotated[int | None, _described("samples_disk_mib")] = None,
    participant_samples_mib: Annotated[int | None, _described("participant_samples_mib")] = None,
    max_bodies: Annotated[int | None, _described("max_bodies")] = None,
    max_steps: Annotated[int | None, _described("max_steps")] = None,
    max_connections: Annotated[int | None, _described("max_connections")] = None,
    max_address_connections: Annotated[int | None, _described("max_address_connections")] = None,
    max_participant_connections: Annotated[
        int | None, _described("max_participant_connections")
    ] = None,
    first_request_timeout_s: Annotated[float | None, _described("first_request_timeout_s")] = None,
    graph_timeout_s: Annotated[float | None, _described("graph_timeout_s")] = None,
    step_timeout_s: Annotated[float | None, _described("step_timeout_s")] = None,
    body_timeout_s: Annotated[float | None, _described("body_timeout_s")] = None,
    stall_timeout_s: Annotated[float | None, _described("stall_timeout_s")] = None,
    live_window_s: Annotated[float | None, _described("live_window_s")] = None,
    max_wait_s: Annotated[float | None, _described("max_wait_s")] = None,
    certs: Annotated[Path | None, _described("certs")] = None,
    insecure: Annotated[bool | None, _described("insecure")] = None,
    operator_token: Annotated[str | None, _described("operator_token")] = None,
    operator_token_file: Annotated[Path | None, _described("operator_token_file")] = None,
    join_token: Annotated[str | None, _described("join_token")] = None,
    join_token_file: Annotated[Path | None, _described("join_token_file")] = None,
    tls_cert: Annotated[Path | None, _described("tls_cert")] = None,
    tls_key: Annotated[Path | None, _described("tls_key")] = None,
    log_level: Annotated[str | None, _described("log_level")] = None,
) -> None:
    """Host the split server until a signal stops it."""
    flags = {name: value for name, value in locals().items() if name != "config"}
    settings = load_settings(flags, config)
    set_up_logging(settings.log_level)
    # Imported here: torch takes seconds to import, which the other commands do not need.
    from split_server.app import create_app, serve_until_stopped
    from split_server.runtime.process import keep_large_buffers, raise_descriptor_limit

    raise_descriptor_limit()
    keep_large_buffers()
    server = create_app(settings)
    if settings.exposed:
        logging.getLogger("split_server").warning(
            "insecure: others can reach %s, without %s",
            settings.host,
            " and ".join(settings.exposed),
        )
    _log_memory_limits(settings, f"{server.placement.device}, {server.placement.dtype_name}")
    with private_files():
        serve_until_stopped(server, settings)


def _log_memory_limits(settings: ServerSettings, placement: str) -> None:
    logging.getLogger("split_server").info(
        "bodies on %s; memory limits: %d MiB for open steps, %d MiB for request bodies, %d MiB for "
        "the engine's queue, %d MiB for cached responses, %d MiB for cached samples (%d MiB on "
        "disk), and the weights of %d bodies; data in %s",
        placement,
        settings.engine_memory_mib,
        settings.request_bodies_bytes // MIB,
        settings.engine_queue_bytes // MIB,
        settings.answer_mib,
        settings.samples_mib,
        settings.samples_disk_mib,
        settings.max_bodies,
        settings.data_dir,
    )
