"""The phases of a round on a real, small vision transformer, against plain torch."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_client.data.batches import Augmentation, shuffled
from edge_client.method import device_method
from edge_client.torch_model import TorchModel, read
from edge_client.training import RoundContext, evaluate
from edge_client.training.local_update import local_update
from edge_client.training.selection import select_samples
from edge_client.training.split_training import split_train
from protocol.errors import StepLost
from protocol.seeds import derive_seed
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.head_file import write_head_file
from split_model.checkpoints.state import load_state
from split_model.optimizer import learning_rate_factor
from tests.support.edge import SMALL, BodyServer, device_model, files, image_set, round_context
from tuning_methods.custom.settings import Custom
from tuning_methods.sfprompt.device import SFPromptPaperDevice

SGD = {
    "optimizer": "sgd",
    "schedule": "constant",
    "prompt_learning_rate": 0.5,
    "tail_learning_rate": 0.1,
    "momentum": 0.9,
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Uncut(nn.Module):
    """timm's own model with the same weights, and prompts behind the class token."""

    def __init__(self) -> None:
        super().__init__()
        paths = files()
        state = load_state(paths.state)
        self.model = timm.create_model(SMALL.backbone, img_size=32, num_classes=3)
        weights = dict(open_backbone(paths.backbone))
        weights |= {
            name.removeprefix("tail."): value.clone()
            for name, value in state.items()
            if name.startswith("tail.")
        }
        self.model.load_state_dict(weights)
        self.model.eval().requires_grad_(False)
        for tuned in (self.model.norm, self.model.head):
            tuned.requires_grad_(True)
        self.prompts = nn.Parameter(state["prompts"].clone())

    def forward(self, images: Tensor) -> Tensor:
        x = self.model._pos_embed(self.model.patch_embed(images))  # (B, 1 + N, D)
        prompts = self.prompts.expand(len(x), -1, -1)
        x = self.model.blocks(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
        return self.model.head(self.model.norm(x)[:, 0])

    def state(self) -> dict[str, Tensor]:
        tuned = {"norm": self.model.norm, "head": self.model.head}
        state = {"prompts": self.prompts.detach().clone()}
        for name, module in tuned.items():
            state |= {f"tail.{name}.{k}": v.clone() for k, v in module.state_dict().items()}
        return state


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert np.allclose(value, expected[name], rtol=0, atol=tolerance), name


def moved(state: dict[str, Tensor]) -> float:
    start = load_state(files().state)
    return min(float(np.abs(np.asarray(state[name]) - start[name].numpy()).max()) for name in start)


# Scoring


def el2n_by_hand(model: TorchModel, context: RoundContext) -> list[float]:
    scores = []
    for position in range(len(context.samples)):
        image, label = read(context.samples.images, [position])
        logits = model.tail(model.head(image)).flatten().tolist()
        total = sum(math.exp(value) for value in logits)
        error = [math.exp(value) / total - (i == int(label)) for i, value in enumerate(logits)]
        scores.append(math.sqrt(sum(value * value for value in error)))
    return scores


@pytest.mark.parametrize(("fraction", "count"), [(0.3, 3), (0.5, 5), (0.01, 1)])
def test_samples_with_the_highest_el2n_are_selected(fraction: float, count: int) -> None:
    context = round_context(keep_fraction=fraction, pruning="el2n")
    scores = el2n_by_hand(context.model, context)
    ranked = sorted(range(10), key=lambda position: -scores[position])
    assert scores[ranked[count - 1]] - scores[ranked[count]] > 1e-6  # no draw on the border
    assert select_samples(context).tolist() == sorted(ranked[:count])


def test_prompts_and_body_have_no_say_in_the_scores() -> None:
    context = round_context(keep_fraction=0.3)
    before = select_samples(context)
    with torch.no_grad():
        context.model.prompts.normal_()
    assert np.array_equal(select_samples(context), before)


def test_each_class_keeps_its_share() -> None:
    context = round_context(samples=9, keep_fraction=0.34, prune_per_class=True)
    selected = select_samples(context)
    assert sorted(context.samples.images.image_set.labels[selected].tolist()) == [0, 1, 2]


def test_a_share_of_one_selects_all_samples_without_scoring() -> None:
    progress: list[str] = []
    context = round_context(keep_fraction=1.0, advance=lambda phase, *_: progress.append(phase))
    assert select_samples(context).tolist() == list(range(10))
    assert progress == []


@pytest.mark.parametrize("pruning", ["grand", "margin", "loss", "random"])
def test_every_score_of_the_settings_works(pruning: str) -> None:
    context = round_context(keep_fraction=0.5, pruning=pruning)
    selected = select_samples(context)
    assert len(selected) == 5
    assert np.array_equal(selected, select_samples(context))


def test_random_pruning_differs_by_round_and_device() -> None:
    def draw(**more: Any) -> tuple[int, ...]:
        context = round_context(samples=60, keep_fraction=0.5, pruning="random", **more)
        return tuple(select_samples(context).tolist())

    model = device_model()
    draws = {
        draw(model=model),
        draw(model=model, round_=2),
        draw(model=model, name="other"),
    }
    assert len(draws) == 3


# Local-loss update


def batches(purpose: str, samples: int, epochs: int) -> list[Tensor]:
    seed = derive_seed(5, purpose, "device", 1)
    return [order for epoch in range(epochs) for order in shuffled(samples, 4, seed, epoch)]


def test_the_local_update_is_a_plain_torch_loop() -> None:
    context = round_context(local_epochs=2, local_learning_rate_scale=0.5, **SGD)
    loss = local_update(context, device_method(Custom.of(context.run)).local_forward)

    model = device_model()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.prompts], "lr": 0.25},
            {"params": list(model.tail.parameters()), "lr": 0.05},
        ],
        momentum=0.9,
    )
    losses = []
    for positions in batches("local", 10, 2):
        images, labels = read(context.samples.images, positions)
        value = F.cross_entropy(model.tail(model.head(images, model.prompts)), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item() * len(positions))
    assert_same(context.model.state(), model.state(), 1e-6)
    assert loss == pytest.approx(sum(losses[3:]) / 10)
    assert moved(model.state()) > 1e-4


def test_a_local_update_through_a_small_body_is_a_plain_torch_loop(tmp_path: Path) -> None:
    weights = open_backbone(files().backbone)
    # Of blocks 1 ... 5, by hand: the middles of two halves.
    sources = {"blocks.1.": "blocks.2.", "blocks.2.": "blocks.4."}
    small = {
        own + name.removeprefix(source): weights[name]
        for own, source in sources.items()
        for name in weights
        if name.startswith(source)
    }
    head, _ = write_head_file(SMALL, files().backbone, tmp_path / "head", "float32", small)
    model = TorchModel.load(SMALL, head, files().state)
    context = round_context(model, local_epochs=2, **SGD)
    run = context.run.model_copy(update={"method": {"local_body": 2}})
    context = dataclasses.replace(context, run=run)
    method = SFPromptPaperDevice()
    loss = local_update(context, method.local_forward)

    whole = timm.create_model(SMALL.backbone, img_size=32, num_classes=3).eval()
    whole.load_state_dict(dict(weights), strict=False)
    plain = device_model()
    rates = ((plain.prompts, 0.5), (plain.tail, 0.1))
    groups = [
        {"params": [own] if isinstance(own, nn.Parameter) else list(own.parameters()), "lr": rate}
        for own, rate in rates
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    losses = []
    for positions in batches("local", 10, 2):
        images, labels = read(context.samples.images, positions)
        tokens = whole.blocks[4](whole.blocks[2](plain.head(images, plain.prompts)))
        value = F.cross_entropy(plain.tail(tokens), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item() * len(positions))
    assert_same(context.model.state(), plain.state(), 1e-5)
    assert loss == pytest.approx(sum(losses[3:]) / 10, rel=1e-4)
    body = method.local_body(context)
    assert body is not None
    assert all(parameter.grad is None for parameter in body.parameters())


def test_no_local_epochs_change_nothing() -> None:
    context = round_context(local_epochs=0)
    assert local_update(context, device_method(Custom.of(context.run)).local_forward) is None
    assert_same(context.model.state(), load_state(files().state), 0)


def test_a_warm_up_does_not_waste_the_first_local_update() -> None:
    context = round_context(local_epochs=1, warmup_rounds=1)
    local_update(context, device_method(Custom.of(context.run)).local_forward)
    assert moved(context.model.state()) > 0


# Split training


def test_split_training_is_the_uncut_model_s_step_by_step() -> None:
    states: list[dict[str, Tensor]] = []
    context = round_context(
        split_epochs=2, advance=lambda *_: states.append(context.model.state()), **SGD
    )
    server = BodyServer()
    selected = np.array([0, 2, 3, 5, 7, 8, 9])
    trained = split_train(context, server.plane, selected)

    uncut = Uncut()
    tuned = [*uncut.model.norm.parameters(), *uncut.model.head.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": [uncut.prompts], "lr": 0.5}, {"params": tuned, "lr": 0.1}], momentum=0.9
    )
    losses = []
    orders = batches("split", 7, 2)
    assert len(states) == len(orders) == 4
    for order, state in zip(orders, states, strict=True):
        images, labels = read(context.samples.images, selected[order])
        value = F.cross_entropy(uncut(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item() * len(order))
        assert_same(state, uncut.state(), 1e-5)
    assert trained.loss == pytest.approx(sum(losses[2:]) / 7, abs=1e-5)
    assert trained.session is None
    assert server.calls == ["forward", "backward"] * 4
    assert moved(uncut.state()) > 1e-4


def test_the_schedule_runs_through_the_steps_of_the_round() -> None:
    rates: list[float] = []
    original = torch.optim.SGD.step

    class Watching(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Watching)
        context = round_context(round_=3, **{**SGD, "schedule": "cosine"})
        split_train(context, BodyServer().plane, np.arange(8))
    training, rounds = context.run.training, context.run.federation.rounds
    expected = [0.5 * learning_rate_factor(training, (2 + s / 2) / rounds, rounds) for s in (0, 1)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("lost", [1, 4])
def test_a_lost_step_is_sent_again_and_changes_nothing(lost: int) -> None:
    smooth = round_context(**SGD)
    trained = split_train(smooth, BodyServer().plane, np.arange(8))
    shaken, server = round_context(**SGD), BodyServer(lose=lost)
    assert split_train(shaken, server.plane, np.arange(8)) == trained
    assert_same(shaken.model.state(), smooth.model.state(), 0)
    assert server.calls == ["forward", "backward"] * (2 + lost)
    assert len(set(server.steps)) == 2 + lost


def test_a_step_that_is_always_lost_is_an_error() -> None:
    context, server = round_context(**SGD), BodyServer(lose=100)
    with pytest.raises(StepLost):
        split_train(context, server.plane, np.arange(4))
    assert len(server.steps) == 5
    assert_same(context.model.state(), load_state(files().state), 0)


def test_steps_have_other_names_in_every_round_and_attempt() -> None:
    names: set[str] = set()
    for round_, attempt in ((1, 0), (1, 1), (2, 0)):
        context, server = round_context(round_=round_, **SGD), BodyServer()
        context.attempt = attempt
        split_train(context, server.plane, np.arange(8))
        names |= set(server.steps)
    assert len(names) == 6


def test_without_prompts_the_tail_alone_is_trained() -> None:
    bare = SMALL.model_copy(update={"prompt_count": 0})
    context = round_context(device_model(bare), **SGD)
    local_update(context, device_method(Custom.of(context.run)).local_forward)
    split_train(context, BodyServer(bare).plane, np.arange(4))
    assert set(context.model.state()) == set(load_state(files(bare).state))


def test_each_epoch_of_the_run_has_its_own_augmentation() -> None:
    seen: list[int] = []

    class Watching(Augmentation):
        def apply(self, images: np.ndarray, positions: np.ndarray, epoch: int) -> np.ndarray:
            seen.append(epoch)
            return super().apply(images, positions, epoch)

    for round_ in (1, 2):
        context = round_context(round_=round_, samples=4, local_epochs=2, split_epochs=1, **SGD)
        context.samples.images.augmentation = Watching(0)
        select_samples(context)
        local_update(context, device_method(Custom.of(context.run)).local_forward)
        split_train(context, BodyServer().plane, np.arange(4))
        evaluate(
            context.model,
            BodyServer().plane,
            context.samples,
            step="evaluate",
            round_=1,
            advance=lambda *_: None,
        )
    assert seen == [0, 1, 2, 3, 4, 5]


# Evaluation


def test_evaluation_counts_the_correct_predictions_of_the_uncut_model() -> None:
    context = round_context(samples=150)
    progress: list[tuple[str, int, int]] = []
    server = BodyServer()
    measured = evaluate(
        context.model,
        server.plane,
        context.samples,
        step="evaluate",
        round_=1,
        advance=lambda *step: progress.append(step),
    )
    images, labels = read(context.samples.images, range(150))
    logits = Uncut()(images)
    assert measured.samples == 150
    assert measured.correct == int((logits.argmax(dim=1) == labels).sum())
    assert measured.loss_sum == pytest.approx(
        F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5
    )
    assert progress == [("evaluate", 1, 2), ("evaluate", 2, 2)]
    assert server.calls == ["infer", "infer"]


def test_a_device_without_test_images_has_nothing_to_count() -> None:
    context = round_context()
    context.samples.images.image_set = image_set().subset([])
    measured = evaluate(
        context.model,
        BodyServer().plane,
        context.samples,
        step="evaluate",
        round_=1,
        advance=lambda *_: None,
    )
    assert (measured.samples, measured.correct, measured.loss_sum) == (0, 0, 0.0)
