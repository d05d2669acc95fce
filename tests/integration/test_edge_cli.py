"""The command ``edge-client``: its help, and errors as one line with exit code 2."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from edge_client import cli
from protocol.errors import Forbidden, NotFound
from protocol.messages import BlobRef, RunStatus, RunView
from protocol.settings import RunSettings
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.export import export_model
from split_model.checkpoints.state import initial_state
from tests.support.edge import SMALL, RawServer, Request, answering, response

REF = BlobRef(sha256="a" * 64, nbytes=10)

Command = Callable[..., tuple[int, str, str]]


def view(name: str, created_at: float, status: RunStatus = RunStatus.WAITING) -> dict[str, object]:
    run = RunView(
        id=name,
        status=status,
        settings=RunSettings(),
        plan=RunSettings().plan,
        round=0,
        participants=0,
        created_at=created_at,
        backbone_bytes=1,
        head=REF,
        state=REF,
    )
    return run.model_dump(mode="json")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs the command in this process; returns exit code, stdout and stderr."""
    threads, terminated = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        if arguments[0] in ("join", "predict") and "--help" not in arguments:
            arguments += ("--home", str(tmp_path / "home"))
        monkeypatch.setattr(sys, "argv", ["edge-client", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, terminated)


class Node:
    """A server with these runs, which lets nobody in."""

    def __init__(self, *runs: dict[str, object]) -> None:
        self.runs, self.targets = runs, []

    def __call__(self, request: Request) -> bytes:
        self.targets.append(f"{request.method} {request.target}")
        if request.target == "/v1/runs":
            return response(json.dumps(self.runs).encode())
        if request.method == "POST":
            body = Forbidden("[/red] joining takes a token [a, b]", hint="ask").to_wire()
            return response(json.dumps(body).encode(), "403 x")
        body = NotFound("no such run", field="run", value=request.target.split("/")[-1]).to_wire()
        return response(json.dumps(body).encode(), "404 x")


def assert_one_line(err: str, *texts: str) -> None:
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    for text in texts:
        assert text in err


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("join", ["--data folder:photos", "--data torchvision:EuroSAT --part 2/6"]),
        ("predict", ["photos/ --json"]),
    ],
)
def test_help_shows_examples(command: Command, name: str, examples: list[str]) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    for example in examples:
        start = f"edge-client {name} http://gpu-node:8500 "
        assert start + example in " ".join(out.split())


def test_help_alone_names_all_commands(command: Command) -> None:
    _, out, err = command("--help")
    assert "join" in out + err
    assert "predict" in out + err
    assert "check" in out + err


def test_an_address_without_a_scheme(command: Command) -> None:
    code, _, err = command("join", "node:8500", "--data", "digits")
    assert code == 2
    assert_one_line(err, "http://HOST:PORT", "found: node:8500")


def test_an_unreachable_server(command: Command) -> None:
    arguments = ["join", "http://127.0.0.1:1", "--data", "digits", "--patience", "0"]
    code, _, err = command(*arguments, "--progress", "json")
    assert code == 2
    assert_one_line(err, "127.0.0.1:1", "is the server running")


def test_an_unknown_run(command: Command) -> None:
    with RawServer(answering(Node(view("known", 1.0)))) as server:
        for name in ("join", "predict"):
            more = ["--data", "digits"] if name == "join" else [str(Path(__file__))]
            code, _, err = command(name, server.url, *more, "--run", "other")
            assert code == 2
            assert_one_line(err, "no such run", "found: other")


def test_no_open_run(command: Command) -> None:
    with RawServer(answering(Node(view("old", 1.0, RunStatus.FINISHED)))) as server:
        code, _, err = command("join", server.url, "--data", "digits", "--progress", "json")
    assert code == 2
    assert_one_line(err, "no open run", "split-server create-run")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("nonsense", "nonsense"),
        ("folder:absent", "absent"),
        ("torchvision:NoSuchSet", "NoSuchSet"),
        ("folder:", "folder:"),
    ],
)
def test_bad_data(command: Command, data: str, text: str) -> None:
    with RawServer(answering(Node(view("r", 1.0)))) as server:
        code, _, err = command("join", server.url, "--data", data, "--progress", "json")
    assert code == 2
    assert_one_line(err, text)


@pytest.mark.parametrize(
    ("option", "value"), [("--part", "5/4"), ("--part", "x"), ("--partition", "dirichlet:-1")]
)
def test_a_bad_part(command: Command, option: str, value: str) -> None:
    more = [option, value] + (["--part", "1/2"] if option == "--partition" else [])
    with RawServer(answering(Node(view("r", 1.0)))) as server:
        arguments = ["join", server.url, "--data", "digits", "--progress", "json", *more]
        code, _, err = command(*arguments)
    assert code == 2
    assert_one_line(err)


def test_a_refusal_is_shown_as_it_is(command: Command) -> None:
    """Square brackets are the server's words, not colours."""
    node = Node(view("old", 1.0), view("new", 2.0), view("over", 3.0, RunStatus.CANCELLED))
    with RawServer(answering(node)) as server:
        arguments = ["join", server.url, "--data", "digits", "--progress", "json"]
        code, _, err = command(*arguments)
    assert code == 2
    assert_one_line(err, "[/red] joining takes a token [a, b]")
    assert node.targets[-1] == "POST /v1/runs/new/participants"


def test_a_missing_image_is_found_before_the_first_request(command: Command) -> None:
    code, _, err = command("predict", "http://127.0.0.1:1", "absent.png")
    assert code == 2
    assert_one_line(err, "absent.png")


def test_a_folder_that_cannot_be_created(command: Command, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with RawServer(answering(Node(view("r", 1.0)))) as server:
        arguments = ["join", server.url, "--data", "digits", "--progress", "json"]
        code, _, err = command(*arguments)
    assert code == 2
    assert_one_line(err, "home")


def test_a_ca_file_that_is_none(command: Command, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    arguments = ["predict", "https://127.0.0.1:1", "x.png", "--ca-file", "absent.pem"]
    code, _, err = command(*arguments)
    assert code == 2
    assert_one_line(err, "absent.pem")


def exported(folder: Path) -> Path:
    backbone = prepare_backbone(SMALL, SMALL.weights, folder / "backbones").path
    state = initial_state(SMALL, open_backbone(backbone), seed=3)
    return export_model(SMALL, backbone, state, folder / "model.safetensors")


def test_predicting_names_files_that_are_no_text_and_keeps_all_rows(
    command: Command, tmp_path: Path
) -> None:
    model, photos = exported(tmp_path), tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((9, 9), 90).save(photos / "good.png")
    Path(os.fsdecode(os.fsencode(photos) + b"/broken\xff.jpg")).write_bytes(b"no picture")
    (photos / "notes.txt").write_text("notes")
    code, out, err = command("predict", str(model), str(photos))
    assert code == 0, err
    assert "broken\\xff.jpg" in out
    assert "good.png" in out
    assert "notes.txt" in err
    code, out, _ = command("predict", str(model), str(photos), "--json")
    assert [Path(json.loads(line)["path"]).name for line in out.splitlines()] == [
        "broken\\xff.jpg",
        "good.png",
    ]
    broken = next(file for file in os.listdir(photos) if "broken" in file)
    code, out, err = command("predict", str(model), str(photos / broken))
    assert code == 2
    assert "broken\\xff.jpg" in out
    assert "none of the images can be read" in err


def test_joining_with_names_that_are_no_text_is_refused_in_one_line(
    command: Command, tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xe9pe"))
    folder.mkdir()
    with RawServer(answering(Node(view("r", 1.0)))) as server:
        arguments = ["join", server.url, "--data", f"folder:{folder}", "--progress", "json"]
        code, _, err = command(*arguments)
    assert code == 2
    assert_one_line(err, "c\\xe9pe")


def test_check_reports_without_a_server(command: Command, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "P" / name).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((20, 20), 90).save(tmp_path / "P" / name / f"{number}.png")
    code, out, _ = command("check", "P", "--classes", "cat,dog", "--json")
    assert code == 0
    assert json.loads(out)["classes"]["dog"] == {"train": 2, "test": 1}
    code, _, err = command("check", "absent")
    assert code == 2
    assert_one_line(err, "absent")
