"""The command ``split-server``: host the split server, and manage its runs."""

from __future__ import annotations

from typing import Annotated

import typer

from protocol.command import Subcommand, group_of, run_command, version_option

_RUNS = "split_server.commands.runs"

_CONTROL = "split_server.commands.control"

_SUBCOMMANDS = {
    "serve": Subcommand(
        "split_server.commands.serve",
        "Host the split server until a signal stops it.",
        (
            "split-server serve --host 0.0.0.0 --certs certs --data-dir /srv/sfprompt",
            "split-server serve --config server.toml --device cuda --dtype bfloat16",
        ),
        (
            "Settings may also be given in the environment (SPLIT_SERVER_PORT) or in a TOML file "
            "(port = 8500). Flags override the environment, which overrides the file.",
        ),
    ),
    "certs": Subcommand(
        "split_server.commands.certs",
        "Make a certificate authority, a certificate of this server, and a join token.",
        ("split-server certs --host gpu-node --host 10.0.0.5 --out certs",),
        ("A second call replaces the server's certificate alone: devices keep what they have.",),
    ),
    "init": Subcommand(
        "split_server.commands.init",
        "Write the settings of a run, from a folder of images or from five answers.",
        (
            "split-server init --data photos --devices 3",
            "split-server init --classes cat,dog --out run.toml",
        ),
    ),
    "create-run": Subcommand(
        _RUNS,
        "Create a run for devices to join.",
        (
            "split-server create-run --config run.toml",
            "split-server create-run --set model.num_classes=6 --set federation.rounds=20",
        ),
    ),
    "runs": Subcommand(_RUNS, "List the runs of a server.", ("split-server runs --json",)),
    "status": Subcommand(
        _CONTROL,
        "Show who is there, whom a run waits for, and when it goes on.",
        ("split-server status RUN", "split-server status RUN --json"),
    ),
    "watch": Subcommand(
        _RUNS,
        "Print a run's events until it is over.",
        ("split-server watch RUN --data-dir sfprompt-data",),
    ),
    "results": Subcommand(
        _RUNS,
        "Show a run's rounds: updates, losses, accuracy, traffic, and the privacy budget spent.",
        ("split-server results RUN --json",),
    ),
    "evaluation": Subcommand(
        "split_server.commands.evaluation",
        "Show how well a round's model classifies held-out images, by device and by class.",
        ("split-server evaluation RUN", "split-server evaluation RUN --round best --json"),
    ),
    "pause": Subcommand(
        _CONTROL,
        "Let the open round end, and open no further one until the run is resumed.",
        ("split-server pause RUN",),
    ),
    "resume": Subcommand(_CONTROL, "Let a paused run go on.", ("split-server resume RUN",)),
    "close-round": Subcommand(
        _CONTROL,
        "End the open phase of a round now, without the devices that are missing.",
        ("split-server close-round RUN",),
    ),
    "cancel": Subcommand(_RUNS, "Stop a run; its devices learn of it with their next request."),
    "remove-device": Subcommand(
        _RUNS,
        "Remove a device from a run and revoke its credential; the run goes on without it.",
        ("split-server remove-device RUN kitchen",),
        ("Who has the join token can join as another device: give the others a new token, too.",),
    ),
    "delete": Subcommand(
        _RUNS,
        "Delete the rows and files of a run that is over.",
        ("split-server delete RUN",),
    ),
    "gc": Subcommand(
        _CONTROL,
        "Delete all runs that are over, with their files.",
        ("split-server gc --older-than 30", "split-server gc --yes --json"),
        ("Export the models that you want to keep first.",),
    ),
    "export": Subcommand(
        "split_server.commands.export",
        "Write a run's complete tuned model, and its card. Needs no running server.",
        (
            "split-server export RUN --out model.safetensors",
            "split-server export RUN --out model.onnx --round best",
            "split-server export RUN --out model  # a folder for timm.create_model",
        ),
        (
            "Use a safetensors file with: edge-client predict model.safetensors photos/, or, in a "
            "program, sfprompt.load_exported('model.safetensors')(images)",
        ),
    ),
}

app = typer.Typer(
    cls=group_of(_SUBCOMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run the frozen body of a vision transformer for many devices, and average their updates.",
)


@app.callback()
def _options(
    version: Annotated[bool, version_option("split-server")] = False,
) -> None:
    """The options of the command itself."""


def main() -> None:
    """Run the command."""
    run_command(app)


if __name__ == "__main__":
    main()
