"""The command ``edge-client``: take part in a run, leave it, or classify images."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_client.check_command import check
from edge_client.options import (
    BackboneOption,
    CaOption,
    ComputeOption,
    HomeOption,
    MaxDownloadOption,
    MaxEpochsOption,
    MinCutOption,
    NameOption,
    Progress,
    RequireTLSOption,
    RunOption,
    ThreadsOption,
    TokenFileOption,
    TokenOption,
    Url,
    choose_token,
)
from edge_client.policy import (
    DEFAULT_MAX_DOWNLOAD,
    DEFAULT_MAX_EPOCHS,
    DEFAULT_MIN_CUT,
    DevicePolicy,
)
from protocol.command import run_command, version_option
from protocol.errors import NotFound, Removed, SFPromptError
from protocol.printable import printable

# Most modules are imported in functions: --help and errors of arguments wait for none of them, an
# unreachable server not for torch.
if TYPE_CHECKING:
    from edge_client.reporter import Reporter
    from edge_client.transport.client import Server
    from edge_client.transport.link import Link
    from protocol.messages import RunView

REMOVED = 4  # exit code: the operator removed this device

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Tune a split vision model together with others; images stay on this device, and labels "
    "unless you share them.",
)


@app.callback()
def _options(
    version: Annotated[bool, version_option("edge-client")] = False,
) -> None:
    """The options of the command itself."""


@app.command(
    epilog="Examples:\n\n"
    "edge-client join http://gpu-node:8500 --data folder:photos\n\n"
    "edge-client join http://gpu-node:8500 --data torchvision:EuroSAT --part 2/6"
)
def join(
    url: Url,
    name: NameOption,
    data: Annotated[
        str,
        typer.Option(
            help="folder:PATH (class folders, or train/ and test/ with class folders) | "
            "torchvision:NAME[:ROOT] | fashion-mnist | digits"
        ),
    ],
    run: RunOption = None,
    part: Annotated[
        str | None,
        typer.Option(help="Use only part k of n of the data, e.g. 1/4, to simulate n devices."),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="How --part divides: iid | dirichlet:ALPHA | shards:N | quantity:ALPHA | natural "
            "(whole groups, by groups.csv in the folder or GROUP_… in the files' names)"
        ),
    ] = "iid",
    data_seed: Annotated[int, typer.Option(help="Seed of --part, --held-out and limits.")] = 0,
    held_out: Annotated[
        float,
        typer.Option(min=0.01, max=0.9, help="Share to test on, if the data have no test set."),
    ] = 0.2,
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Use at most so many training images.")
    ] = None,
    limit_test: Annotated[
        int | None, typer.Option(min=1, help="Use at most so many test images.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Use so many training images of each class, over all parts."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="Simulate a slower line, for benchmarks, e.g. 20mbit/5mbit,50ms."),
    ] = None,
    threads: ThreadsOption = None,
    compute: ComputeOption = "auto",
    cache_mib: Annotated[
        int,
        typer.Option(
            min=0,
            help="Memory in MiB for resized images, for each of train and test; as much again for "
            "the head's outputs.",
        ),
    ] = 256,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a busy or unreachable server.")
    ] = 300.0,
    share_labels: Annotated[
        bool,
        typer.Option(
            "--share-labels",
            help="Let the server have this device's labels, in a run with labels = shared.",
        ),
    ] = False,
    upload_only: Annotated[
        bool,
        typer.Option(
            "--upload-only",
            help="End when the server has samples and labels; it finishes the run alone. "
            "Implies --share-labels.",
        ),
    ] = False,
    join_token: TokenOption = None,
    join_token_file: TokenFileOption = None,
    ca_file: CaOption = None,
    home: HomeOption = None,
    min_cut: MinCutOption = DEFAULT_MIN_CUT,
    max_download: MaxDownloadOption = DEFAULT_MAX_DOWNLOAD,
    require_tls: RequireTLSOption = False,
    backbone: BackboneOption = None,
    max_epochs: MaxEpochsOption = DEFAULT_MAX_EPOCHS,
    progress: Annotated[
        Progress, typer.Option(help="Progress bars, or lines of JSON.")
    ] = Progress.BAR,
    verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False,
) -> None:
    """Take part in a run until it ends."""
    from edge_client.data.download import cache_dir
    from edge_client.reporter import BarReporter, JsonReporter

    _prepare(verbose)
    _check_data(data, part, partition)
    policy = DevicePolicy(min_cut, max_download, require_tls, tuple(backbone or ()), max_epochs)
    policy.check_address(url)
    reporter: Reporter = JsonReporter() if progress is Progress.JSON else BarReporter()
    folder = home or cache_dir()
    line = None if link is None else _parse_link(link, data_seed, name)
    token = choose_token(join_token, join_token_file)
    server = _server(url, patience, ca_file, reporter, line)
    try:
        chosen = _choose(server, run, token, open_only=True)
        reporter.event("chosen", run=chosen.id, allows=policy.describe())
        policy.check_run(chosen)
        _limit_threads(threads)
        from edge_client.joining import check_consent, join_as, load_run_data
        from edge_client.model import check_compute
        from edge_client.participant import Participant, succeeded
        from edge_client.storage.identity import Identity

        check_consent(chosen, share_labels or upload_only, upload_only)
        check_compute(chosen, compute)
        dataset = load_run_data(
            data,
            chosen,
            part,
            partition,
            data_seed,
            held_out,
            limit_train,
            limit_test,
            shots,
            reporter=reporter,
            cache_bytes=cache_mib * 1024 * 1024,
        )
        participant = Participant(
            server,
            dataset,
            folder / "blobs",
            name,
            reporter,
            cache_mib * 1024 * 1024,
            share_labels or upload_only,
            policy,
            compute,
        )
        with Identity(folder / "identities", url, chosen.id, name) as identity:
            joined = join_as(identity, participant, chosen.id, token)
            if upload_only:
                joined.upload()
                return
            last = joined.take_part()
    except Removed as error:
        reporter.close()
        raise _exit(REMOVED, "Removed from the run", str(error)) from None
    finally:
        reporter.close()
        server.close()
    if not succeeded(last):
        summary = (
            f"The run ended as {last.status}" if last.status.is_over else "No longer taking part"
        )
        raise _exit(3, summary, last.reason or "no reason given")


def _exit(code: int, summary: str, reason: str) -> typer.Exit:
    """Print why the command ends, and return the exception that ends it with this code."""
    from rich.console import Console
    from rich.markup import escape

    text = f"[red]{summary}[/red]: {escape(printable(reason))}"
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)
    return typer.Exit(code)


@app.command(
    epilog="Examples:\n\nedge-client predict http://gpu-node:8500 photos/ --json\n\n"
    "edge-client predict model.safetensors photos/"
)
def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="Address of the split server, or the file of an exported model (needs no server)."
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders with image files.")],
    name: NameOption,
    run: RunOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per image.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row per image.")] = False,
    threads: ThreadsOption = None,
    compute: ComputeOption = "auto",
    join_token: TokenOption = None,
    join_token_file: TokenFileOption = None,
    ca_file: CaOption = None,
    home: HomeOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False,
) -> None:
    """Classify images with the newest tuned state of a run, or with an exported model."""
    from edge_client.data.download import cache_dir
    from edge_client.data.image_files import image_files
    from edge_client.prediction_output import Form, show_predictions, show_skipped
    from edge_client.storage.identity import Identity

    _prepare(verbose)
    form: Form = "csv" if as_csv else "json" if as_json else "table"
    files, skipped = image_files(images)
    show_skipped(skipped)
    if model.endswith(".safetensors"):
        from edge_client.model import require_torch

        require_torch("an exported model")
        from edge_client.whole_prediction import WholePredictor

        _limit_threads(threads)
        show_predictions(WholePredictor(Path(model)).predict(files, top), top, form)
        return
    folder = home or cache_dir()
    token = choose_token(join_token, join_token_file)
    server = _server(model, 30.0, ca_file, None)
    try:
        chosen = _choose(server, run, token, open_only=False)
        _limit_threads(threads)
        from edge_client.prediction import Predictor

        guest = f"{name} (predict)"
        with Identity(folder / "identities", model, chosen.id, guest) as identity:
            predictor = Predictor.join(
                server, chosen, folder / "blobs", identity.key, guest, token, compute
            )
        show_predictions(predictor.predict(files, top), top, form)
    finally:
        server.close()


@app.command(
    epilog="Examples:\n\nedge-client leave http://gpu-node:8500\n\n"
    "edge-client leave http://gpu-node:8500 --samples-only"
)
def leave(
    url: Url,
    name: NameOption,
    run: RunOption = None,
    samples_only: Annotated[
        bool,
        typer.Option(
            help="Stay in the run, but delete this device's smashed data from the server; they are "
            "sent again when needed."
        ),
    ] = False,
    join_token: TokenOption = None,
    join_token_file: TokenFileOption = None,
    ca_file: CaOption = None,
    home: HomeOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False,
) -> None:
    """Leave a run for good; the server deletes this device's samples.

    A process that takes part for this device ends at its next request.
    """
    from edge_client.data.download import cache_dir
    from edge_client.storage.identity import credential_of

    _prepare(verbose)
    token = choose_token(join_token, join_token_file)
    server = _server(url, 30.0, ca_file, None)
    try:
        chosen = _choose(server, run, token, open_only=True)
        credential = credential_of((home or cache_dir()) / "identities", url, chosen.id, name)
        if credential is None:
            raise NotFound(
                "this device has not joined the run under this name",
                field="name",
                value=name,
                hint="use the address, --name and --home with which the device joined",
            )
        server.authenticate(credential)
        if samples_only:
            server.forget_samples(chosen.id)
        else:
            server.leave(chosen.id)
    finally:
        server.close()
    done = "has had its samples deleted" if samples_only else "has left"
    typer.echo(f"{name} {done}: run {chosen.id}")


app.command(epilog="Example:\n\nedge-client check photos --classes cat,dog")(check)


def _prepare(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    for noisy in ("httpx", "httpcore", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # SIGTERM acts like Ctrl-C: finally-blocks run, and bars are cleared.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _limit_threads(threads: int | None) -> None:
    """Limit the threads of NumPy's matrix products, and of torch, before either is imported."""
    if threads is not None:
        for library in ("OMP", "OPENBLAS", "MKL"):
            os.environ[f"{library}_NUM_THREADS"] = str(threads)


def _check_data(source: str, part: str | None, partition: str) -> None:
    """Refuse texts of another form before the first request; the data are loaded later."""
    from edge_client.data.sources import parse_source

    parse_source(source)
    if part is not None:
        from edge_client.data.partition import Part, parse_scheme

        Part.parse(part)
        parse_scheme(partition)


def _parse_link(text: str, seed: int, name: str) -> Link:
    """Return the simulated link, with a seed that is different for each device."""
    from edge_client.transport.link import Link
    from protocol.seeds import derive_seed

    return replace(Link.parse(text), seed=derive_seed(seed, "link", name))


def _server(
    url: str,
    patience: float,
    ca_file: Path | None,
    reporter: Reporter | None,
    link: Link | None = None,
) -> Server:
    from edge_client.transport.client import Server
    from edge_client.transport.retry import RetryPolicy

    def report(error: SFPromptError, seconds: float) -> None:
        if reporter is not None:
            reporter.event("waiting", reason=str(error), seconds=seconds)

    def tell(kind: str, message: str) -> None:
        if reporter is not None:
            reporter.event(kind, message=message)

    retry = RetryPolicy(patience_s=patience, on_wait=report)
    return Server(url, retry=retry, ca_file=ca_file, link=link, tell=tell)


def _choose(
    server: Server, run_id: str | None, join_token: str | None, *, open_only: bool
) -> RunView:
    """Return the run of this id, or else the newest suitable one."""
    from protocol.messages import RunStatus

    if join_token is not None:
        server.authenticate(join_token, "join_token")
    if run_id is not None:
        return server.run(run_id)
    suitable = [
        run
        for run in server.runs()
        if (not run.status.is_over if open_only else run.status is not RunStatus.FAILED)
    ]
    if not suitable:
        raise NotFound(
            "the server has no open run" if open_only else "the server has no run",
            field="run",
            hint="create one on the server: split-server create-run",
        )
    return max(suitable, key=lambda run: run.created_at)


def main() -> None:
    """Run the command."""
    run_command(app)


if __name__ == "__main__":
    main()
