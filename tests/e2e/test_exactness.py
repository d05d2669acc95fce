"""Prompts at the input, over HTTP: the same numbers as the uncut model in one process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import shuffled
from edge_client.data.dataset import limit_per_set
from edge_client.data.sources import load_dataset
from edge_client.participant import JoinedRun, Participant
from edge_client.torch_model import read
from edge_client.transport.client import Server
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_server.client import OperatorClient
from split_server.federation.export import newest_state
from tests.e2e.conftest import data_dir_of, small_run
from tests.support.federation import OPERATOR
from tests.support.reporters import SilentReporter
from tests.support.server import RunningServer
from tuning_methods.custom.settings import Custom

STEPS_COMPARED = 12


class StateRecorder(SilentReporter):
    """Copies prompts and tail after every step of split training."""

    def __init__(self) -> None:
        self.participant: JoinedRun | None = None
        self.states: list[dict[str, Tensor]] = []

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase == "split" and self.participant is not None:
            self.states.append(self.participant.model.state())


class Uncut:
    """timm's model; a hook inserts the prompts before the first block."""

    def __init__(self, settings: RunPlan, folder: Path, state: dict[str, Tensor]) -> None:
        model = settings.model
        split = model
        weights = open_backbone(prepare_backbone(split, model.weights, folder).path)
        self.model = timm.create_model(
            model.backbone, img_size=model.image_size, num_classes=model.num_classes
        ).eval()
        tail = {name.removeprefix("tail."): t for name, t in state.items() if name != "prompts"}
        self.model.load_state_dict({**{name: weights[name] for name in weights}, **tail})
        self.model.requires_grad_(False)
        self.tail_names = sorted(tail)
        parameters = dict(self.model.named_parameters())
        self.tail = [parameters[name].requires_grad_() for name in self.tail_names]
        self.prompts = state["prompts"].clone().requires_grad_()
        self.model.blocks[0].register_forward_pre_hook(self._insert_prompts)

    def _insert_prompts(self, _block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = arguments[0]
        prompts = self.prompts.expand(tokens.shape[0], -1, -1)  # from [P, D]
        return (torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1), *arguments[1:])

    def state(self) -> dict[str, Tensor]:
        tail = zip(self.tail_names, self.tail, strict=True)
        return {
            "prompts": self.prompts.detach().clone(),
            **{f"tail.{name}": value.detach().clone() for name, value in tail},
        }


def test_one_device_with_sgd_equals_the_uncut_model_in_each_step(
    node: RunningServer, tmp_path: Path
) -> None:
    settings = small_run(
        rounds=2,
        keep_fraction=1,
        local_epochs=0,
        optimizer="sgd",
        momentum=0.9,
        schedule="constant",
        prompt_learning_rate=0.05,
        tail_learning_rate=0.02,
    )
    data = limit_per_set(load_dataset("digits"), train=6 * 16 - 3, test=10, seed=0)
    recorder = StateRecorder()
    with contextlib.closing(OperatorClient(node.url, OPERATOR)) as operator:
        run = operator.create_run(Custom.of(settings))
    with contextlib.closing(Server(node.url)) as client:
        device = Participant(client, data, tmp_path / "blobs", "only", recorder)
        participant = device.join(run.id, key="join-1")
        recorder.participant = participant
        _, initial = newest_state(data_dir_of(node), run.id)
        participant.take_part()
    _, final = newest_state(data_dir_of(node), run.id)

    uncut = Uncut(settings, tmp_path / "backbones", initial)
    samples = participant.samples.train.images
    step = 0
    for round_ in (1, 2):
        optimizer = torch.optim.SGD(
            [{"params": [uncut.prompts], "lr": 0.05}, {"params": uncut.tail, "lr": 0.02}],
            momentum=0.9,
        )
        seed = derive_seed(settings.seed, "split", "only", round_)
        for positions in shuffled(len(samples), 16, seed, 0):
            images, labels = read(samples, positions)
            optimizer.zero_grad()
            F.cross_entropy(uncut.model(images), labels).backward()
            optimizer.step()
            expected = uncut.state()
            for name, value in recorder.states[step].items():
                torch.testing.assert_close(
                    torch.as_tensor(value), expected[name], rtol=0, atol=1e-5, msg=name
                )
            step += 1
    assert step == len(recorder.states) == STEPS_COMPARED
    for name, value in uncut.state().items():
        torch.testing.assert_close(final[name], value, rtol=0, atol=1e-5, msg=name)
    moved = (final["prompts"] - initial["prompts"]).abs().max()
    assert moved > 1e-4  # otherwise two untrained models would be compared
