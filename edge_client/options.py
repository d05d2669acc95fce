"""Options that several subcommands of ``edge-client`` share."""

from __future__ import annotations

import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from protocol.command import read_token_file


class Progress(StrEnum):
    """The form in which a device reports its progress."""

    BAR = "bar"
    JSON = "json"


Url = Annotated[str, typer.Argument(help="Address of the split server, e.g. https://gpu-node:8500")]

RunOption = Annotated[
    str | None, typer.Option("--run", help="Id of the run. Default: the newest suitable run.")
]

CaOption = Annotated[
    Path | None, typer.Option("--ca-file", help="PEM file to trust for https, e.g. your own CA.")
]

TokenOption = Annotated[
    str | None,
    typer.Option(
        "--join-token",
        envvar="EDGE_CLIENT_JOIN_TOKEN",
        help="The server's join token, if it has one. The list of processes shows it to others: "
        "prefer the variable or a file.",
    ),
]

TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--join-token-file",
        envvar="EDGE_CLIENT_JOIN_TOKEN_FILE",
        help="File with the server's join token.",
    ),
]

NameOption = Annotated[
    str,
    typer.Option(
        "--name",
        default_factory=socket.gethostname,
        show_default="the host's name",
        help="This device's name; a restart with the same name continues as before.",
    ),
]

ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all.")]

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Folder for downloads and the device's identity.")
]


MinCutOption = Annotated[
    int,
    typer.Option(
        "--min-cut",
        envvar="EDGE_CLIENT_MIN_CUT",
        min=0,
        help="Take part only if so many blocks stay on this device; fewer blocks tell the server "
        "more about the images.",
    ),
]

MaxDownloadOption = Annotated[
    int,
    typer.Option(
        "--max-download",
        envvar="EDGE_CLIENT_MAX_DOWNLOAD",
        min=1,
        help="Largest download for head and tuned state together, in bytes.",
    ),
]

RequireTLSOption = Annotated[
    bool,
    typer.Option(
        "--require-tls", envvar="EDGE_CLIENT_REQUIRE_TLS", help="Refuse an address without https."
    ),
]

BackboneOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone",
        envvar="EDGE_CLIENT_BACKBONE",
        help="Take part only with this backbone (repeat it for several). Default: with every one.",
    ),
]

MaxEpochsOption = Annotated[
    int,
    typer.Option(
        "--max-epochs",
        envvar="EDGE_CLIENT_MAX_EPOCHS",
        min=0,
        help="Most epochs of a round, and views of an image, that a server may ask for.",
    ),
]


def choose_token(token: str | None, file: Path | None) -> str | None:
    """Return the join token from the option, the environment or a file; None: there is none.

    Raises:
        InvalidField: the file cannot be read or is empty.
    """
    if token is None and file is not None:
        return read_token_file(file, "join_token_file")
    return token


ComputeOption = Annotated[
    Literal["auto", "numpy", "torch"],
    typer.Option(
        "--compute", help="The library that computes. auto: torch only in runs that need it."
    ),
]
