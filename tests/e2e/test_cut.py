"""Prompts at the cut, over HTTP: the same numbers as the uncut model, also after failures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import shuffled
from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.sources import load_dataset
from edge_client.participant import JoinedRun, Participant, succeeded
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.messages import Results, RunStatus, Task
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from protocol.wire import PROTOCOL_VERSION, VERSION_HEADER
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_server.client import OperatorClient, read_token
from split_server.federation.export import newest_state
from tests.e2e.conftest import ServerProcess, data_dir_of, small_run
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer, running_server
from tuning_methods.custom.settings import Custom

BATCH, TRAIN, TEST = 16, 4 * 16 - 3, 10

WIDTH, TOKENS = 64, 1 + 4  # class token, 2 x 2 patches


@pytest.fixture(scope="module")
def data() -> Dataset:
    return limit_per_set(load_dataset("digits"), train=TRAIN, test=TEST, seed=0)


def cut_run(
    depth: str = "shallow",
    *,
    wire: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **training: Any,
) -> RunPlan:
    """Two rounds with prompts at the cut."""
    values = small_run(**training).model_dump()
    values["model"] |= {"prompt_at": "cut", "prompt_depth": depth, **(model or {})}
    values["wire"] |= wire or {}
    return RunPlan.model_validate(values)


@dataclass
class RecordingReporter:
    """Records a device's events, and calls a test's functions at its steps.

    Attributes:
        at: called after a step of split training, by round and step.
        steps: called after each step of split training.
        evaluated: called at the end of a round.
        events: the kinds of all events.
        round: the current round.
    """

    at: dict[tuple[int, int], Callable[[], None]] = field(default_factory=dict)
    steps: Callable[[], None] = lambda: None
    evaluated: Callable[[], None] = lambda: None
    events: list[str] = field(default_factory=list)
    round: int = 1

    def event(self, kind: str, **data: Any) -> None:
        self.events.append(kind)
        if kind == "evaluated":
            self.evaluated()
            self.round = data["round"] + 1

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase == "split":
            self.steps()
            self.at.pop((self.round, done), lambda: None)()

    def close(self) -> None: ...


@dataclass
class FinishedRun:
    results: Results
    state: dict[str, Tensor]  # prompts and tail
    traffic: dict[str, dict[str, int]]  # as the device counted it


def take_part(
    url: str,
    token: str,
    server_folder: Path,
    settings: RunPlan,
    data: Dataset,
    home: Path,
    reporter: RecordingReporter,
    started: Callable[[JoinedRun], None] = lambda _: None,
) -> FinishedRun:
    """Create a run and go through it as its only device."""
    with (
        contextlib.closing(OperatorClient(url, token)) as operator,
        contextlib.closing(Server(url)) as client,
    ):
        run = operator.create_run(Custom.of(settings))
        device = Participant(client, data, home, "only", reporter)
        participant = device.join(run.id, key="join-1")
        started(participant)
        assert succeeded(participant.take_part())
        results = operator.results(run.id)
        counted = client.traffic().to_dict()
    assert results.run.status is RunStatus.FINISHED
    return FinishedRun(results, newest_state(server_folder, run.id)[1], counted)


def on_node(
    node: RunningServer, settings: RunPlan, data: Dataset, home: Path, reporter: RecordingReporter
) -> FinishedRun:
    return take_part(node.url, OPERATOR, data_dir_of(node), settings, data, home, reporter)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different


# Comparison with the uncut model


class Uncut:
    """timm's model; hooks insert the prompts before the blocks behind the cut."""

    def __init__(self, settings: RunPlan, folder: Path, state: dict[str, Tensor]) -> None:
        model = settings.model
        weights = open_backbone(prepare_backbone(model, model.weights, folder).path)
        self.model = timm.create_model(
            model.backbone, img_size=model.image_size, num_classes=model.num_classes
        ).eval()
        tail = {name.removeprefix("tail."): t for name, t in state.items() if name != "prompts"}
        self.model.load_state_dict({**{name: weights[name] for name in weights}, **tail})
        self.model.requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        self.tail = {f"tail.{name}": parameters[name].requires_grad_() for name in sorted(tail)}
        self.prompts = state["prompts"].clone().requires_grad_()  # [L, P, D]
        for layer in range(len(self.prompts)):
            self.model.blocks[model.cut + layer].register_forward_pre_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[..., Any]:
        def insert_prompts(_block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens = arguments[0]
            prompts = self.prompts[layer].expand(len(tokens), -1, -1)
            patches = tokens[:, -(TOKENS - 1) :]
            return (torch.cat([tokens[:, :1], prompts, patches], dim=1), *arguments[1:])

        return insert_prompts


@pytest.mark.parametrize(
    ("depth", "wire"),
    [("shallow", {}), ("deep", {"pooled_features": True, "keep_smashed": True})],
)
def test_one_device_with_sgd_equals_the_uncut_model_in_each_step(
    node: RunningServer, data: Dataset, tmp_path: Path, depth: str, wire: dict[str, Any]
) -> None:
    settings = cut_run(
        depth,
        wire=wire,
        keep_fraction=1,
        local_epochs=0,
        optimizer="sgd",
        momentum=0.9,
        schedule="cosine",
        prompt_learning_rate=2.0,
        tail_learning_rate=0.02,
    )
    tails: list[dict[str, Tensor]] = []
    states: list[dict[str, Tensor]] = []  # after each round
    joined: list[JoinedRun] = []
    reporter = RecordingReporter(steps=lambda: tails.append(joined[0].model.state()))
    reporter.evaluated = lambda: states.append(newest_state(data_dir_of(node), joined[0].run.id)[1])

    def started(participant: JoinedRun) -> None:
        joined.append(participant)
        states.append(newest_state(data_dir_of(node), participant.run.id)[1])

    home = tmp_path / "home"
    take_part(node.url, OPERATOR, data_dir_of(node), settings, data, home, reporter, started)
    initial, *after_rounds = states
    assert len(after_rounds) == 2
    assert len(initial["prompts"]) == (5 if depth == "deep" else 1)

    uncut = Uncut(settings, tmp_path / "backbones", initial)
    samples = joined[0].samples.train.images
    recorded = iter(tails)
    for round_ in (1, 2):
        optimizer = torch.optim.SGD(
            [{"params": [uncut.prompts]}, {"params": list(uncut.tail.values())}],
            lr=0.0,
            momentum=0.9,
        )
        seed = derive_seed(settings.seed, "split", "only", round_)
        batches = shuffled(TRAIN, BATCH, seed, 0)
        for step, positions in enumerate(batches):
            progress = (round_ - 1 + step / len(batches)) / 2  # of the run, 0 to 1
            for group, rate in zip(optimizer.param_groups, (2.0, 0.02), strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            images, labels = read(samples, positions)
            optimizer.zero_grad()
            F.cross_entropy(uncut.model(images), labels).backward()
            optimizer.step()
            assert_close(next(recorded), uncut.tail)
        assert_close(after_rounds[round_ - 1], {**uncut.tail, "prompts": uncut.prompts})
    assert next(recorded, None) is None
    moved = (after_rounds[-1]["prompts"] - initial["prompts"]).abs().amax(dim=(1, 2))
    assert moved.min() > 1e-3, "otherwise untrained prompts would be compared"


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        value = torch.as_tensor(value)
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-5, msg=name)


# Smashed data that the server stores


def run_with_all_features(**wire: Any) -> RunPlan:
    """All phases of a round, two epochs, augmented views, and lossy codecs."""
    codecs = {"smashed": "int8", "features": "float16", "pooled_features": True}
    return cut_run(
        wire={**codecs, **wire},
        keep_fraction=0.6,
        split_epochs=2,
        local_epochs=1,
        augment=True,
        views=3,
    )


@pytest.mark.parametrize("codecs", [{}, {"smashed": "float32", "features": "float32"}])
def test_stored_samples_change_no_bit_of_the_result(
    node: RunningServer, data: Dataset, tmp_path: Path, codecs: dict[str, str]
) -> None:
    stored, plain = (
        on_node(
            node,
            run_with_all_features(keep_smashed=keep, **codecs),
            data,
            tmp_path / str(keep),
            RecordingReporter(),
        )
        for keep in (True, False)
    )
    assert_same_bits(plain.state, stored.state)
    for first, second in zip(plain.results.rounds, stored.results.rounds, strict=True):
        assert (first.train_loss, first.accuracy) == (second.train_loss, second.accuracy)


@pytest.fixture(scope="module")
def undisturbed(
    node: RunningServer, data: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    home = tmp_path_factory.mktemp("undisturbed")
    return on_node(node, run_with_all_features(keep_smashed=True), data, home, RecordingReporter())


def test_server_and_device_count_the_same_bytes_in_every_phase(
    node: RunningServer, undisturbed: FinishedRun
) -> None:
    counted = undisturbed.traffic
    with contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator:
        assert operator.results(undisturbed.results.run.id).traffic == counted
    selected = [view.samples for view in undisturbed.results.rounds]
    views = 2  # of each sample: one in each epoch, the same two in both rounds
    row = TOKENS * WIDTH  # bytes of a sample in int8; the scales are extra
    assert (
        max(selected) * views * row
        < counted["smashed"]["up"]
        < 1.1 * (TRAIN * views + TEST) * row + 20_000
    )
    one_way = sum(selected) * views * WIDTH * 4  # the tail reads one token
    assert one_way < counted["gradients"]["up"] < one_way + 20_000
    assert counted["gradients"]["down"] == 0, "the prompts' gradient stays on the server"
    assert one_way / 2 < counted["features"]["down"] < one_way / 2 + 20_000
    for phase in ("download", "updates", "inference", "control"):
        assert counted[phase]["down"] > 0


def test_samples_that_the_server_loses_change_no_bit_of_the_result(
    node: RunningServer, data: Dataset, tmp_path: Path, undisturbed: FinishedRun
) -> None:
    joined: list[JoinedRun] = []

    def drop_samples() -> None:
        participant = joined[0]
        headers = {**participant._server._headers, VERSION_HEADER: str(PROTOCOL_VERSION)}
        url = f"{node.url}/v1/runs/{participant.run.id}/samples"
        assert httpx.delete(url, headers=headers, trust_env=False).is_success

    reporter = RecordingReporter(
        at={(1, 3): drop_samples, (2, 1): drop_samples, (2, 5): drop_samples}
    )
    finished = take_part(
        node.url,
        OPERATOR,
        data_dir_of(node),
        run_with_all_features(keep_smashed=True),
        data,
        tmp_path,
        reporter,
        joined.append,
    )
    assert not reporter.at
    assert "begun-anew" not in reporter.events
    assert_same_bits(finished.state, undisturbed.state)
    assert finished.traffic["smashed"]["up"] > undisturbed.traffic["smashed"]["up"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_device_whose_participant_has_left_stops_within_the_round(
    node: RunningServer, data: Dataset, tmp_path: Path, keep: bool
) -> None:
    """As after `edge-client leave` in another process."""
    with (
        contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator,
        contextlib.closing(Server(node.url)) as client,
        contextlib.closing(Server(node.url)) as elsewhere,
    ):
        run = operator.create_run(Custom.of(run_with_all_features(keep_smashed=keep)))
        reporter = RecordingReporter(at={(1, 2): lambda: elsewhere.leave(run.id)})
        device = Participant(client, data, tmp_path, "only", reporter)
        participant = device.join(run.id, key="join-1")
        elsewhere.authenticate(participant.credential)
        last = participant.take_part()
    assert (last.task, last.reason) == (Task.STOP, "you have left this run")
    assert "trained" not in reporter.events


def test_a_sample_store_that_is_too_small_changes_no_bit_of_the_result(
    node: RunningServer, data: Dataset, tmp_path: Path
) -> None:
    settings = cut_run(
        model={"image_size": 144},  # 82 tokens: 1.2 MiB for all samples
        wire={"keep_smashed": True},
        rounds=1,
        keep_fraction=1,
    )
    reference = on_node(node, settings, data, tmp_path / "reference", RecordingReporter())
    tiny = {"samples_mib": 1, "samples_disk_mib": 0, "participant_samples_mib": 1}
    with running_server(tmp_path / "tiny", max_batch_samples=1, **tiny) as small:
        finished = on_node(small, settings, data, tmp_path / "home", RecordingReporter())
    assert_same_bits(finished.state, reference.state)
    assert finished.traffic["smashed"]["up"] > 1.1 * reference.traffic["smashed"]["up"]


# A server that is killed


def test_a_server_killed_in_split_training_ends_with_the_same_state(
    data: Dataset, server: ServerProcess, tmp_path: Path, undisturbed: FinishedRun
) -> None:
    reporter = RecordingReporter(at={(2, 3): server.kill_and_restart})
    disturbed = take_part(
        server.url,
        read_token(server.data_dir),
        server.data_dir,
        run_with_all_features(keep_smashed=True),
        data,
        tmp_path / "home",
        reporter,
    )
    assert reporter.events.count("begun-anew") == 1
    assert [view.round for view in disturbed.results.rounds] == [1, 2]
    assert_same_bits(disturbed.state, undisturbed.state)
