"""The references in one process: the same prompts and tail tuned on all the data, and a probe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from edge_client.data import BatchReader, Dataset, ImageSet, cache_dir, load_dataset, shuffled
from edge_client.model import preprocessing_of
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from sfprompt_bench.compare.tasks import Figures
from split_model import (
    Body,
    Head,
    Layered,
    Tail,
    TunedModel,
    build_body,
    build_head,
    build_tail,
    head_tensors,
    image_preparation,
    initial_state,
    open_backbone,
    prepare_backbone,
    tail_tensors,
)
from split_model.backbone.tensor_file import write_tensors
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_model.proxies.weights import plugged
from split_server.models.proxies import IMAGES

_BATCH = 200

Advance = Callable[[int, int], None]  # steps done, steps in all


class Centralised:
    """Head, body and tail of a run in one process, with all its data.

    Args:
        settings: of the run; rounds × split epochs × keep fraction give the passes over the data.
    """

    def __init__(self, settings: RunPlan, data: Dataset) -> None:
        split = settings.model
        backbone = prepare_backbone(split, settings.model.weights, cache_dir() / "backbones")
        weights = open_backbone(backbone.path)
        self.settings = settings
        self.body: Body = build_body(split, weights)
        state = initial_state(split, weights, derive_seed(settings.seed, "initial-state"))
        self.head: Head = build_head(split, Layered(head_tensors(state), weights))
        self.tail: Tail = build_tail(split, Layered(tail_tensors(state), weights))
        self.prompts = nn.Parameter(state["prompts"]) if split.prompt_count else None
        way = preprocessing_of(split, image_preparation(split))
        self.train = BatchReader(data.train, way, cache_bytes=2**30)
        self.test = BatchReader(data.test, way, cache_bytes=2**30)

    @property
    def trainable_parameters(self) -> int:
        """Of prompts, tail and head, whatever is tuned of them."""
        weights = [*self.head.parameters(), *self.tail.parameters()]
        own = sum(weight.numel() for weight in weights if weight.requires_grad)
        return own + (0 if self.prompts is None else self.prompts.numel())

    def tune(self, advance: Advance) -> float:
        """Tune prompts and tail as a run would, on one heap of data. Returns test accuracy.

        As many samples as the run's devices train on through the server, the same optimiser,
        rates and schedule, but no rounds: nothing is averaged, and every pass is over all samples.
        """
        training, rounds = self.settings.training, self.settings.federation.rounds
        optimizer = make_optimizer(training, self.prompts, self.tail, head=self.head)
        passes = rounds * training.split_epochs * training.keep_fraction
        epochs = max(1, round(passes))
        seed = derive_seed(self.settings.seed, "centralised")
        batches = list(
            itertools.chain.from_iterable(
                shuffled(len(self.train), training.batch_size, seed, epoch)
                for epoch in range(epochs)
            )
        )
        for step, positions in enumerate(batches):
            set_progress(optimizer, learning_rate_factor(training, step / len(batches), rounds))
            images, labels = self.train.read(positions)
            loss = F.cross_entropy(self.tail(self._features(images, self.prompts)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(step + 1, len(batches))
        return self._accuracy()

    @torch.no_grad()
    def probe(self) -> float:
        """Test accuracy of logistic regression on the frozen features, without prompts.

        The best of four strengths of regularisation, which favours the probe.
        """
        train, train_labels = self._pooled(self.train)
        test, test_labels = self._pooled(self.test)
        return max(
            float(
                LogisticRegression(C=strength, max_iter=2000)
                .fit(train.numpy(), train_labels.numpy())
                .score(test.numpy(), test_labels.numpy())
            )
            for strength in (0.001, 0.01, 0.1, 1.0)
        )

    def _features(self, images: Tensor, prompts: Tensor | None) -> Tensor:
        at_cut = self.settings.model.prompt_at == "cut"
        smashed = self.head(images, None if at_cut else prompts)
        num_tokens = None if self.body.sizes.averaged else self.tail.num_tokens
        features: Tensor = self.body(smashed, prompts if at_cut else None, num_tokens)
        return features

    def _pooled(self, samples: BatchReader) -> tuple[Tensor, Tensor]:
        pooled, labels = [], []
        for positions in torch.arange(len(samples)).split(_BATCH):
            images, some = samples.read(positions)
            pooled.append(self.tail.pool(self._features(images, None)))
            labels.append(some)
        return torch.cat(pooled), torch.cat(labels)  # [n, F], [n]

    @torch.no_grad()
    def _accuracy(self) -> float:
        correct = 0
        for positions in torch.arange(len(self.test)).split(_BATCH):
            images, labels = self.test.read(positions)
            logits: Tensor = self.tail(self._features(images, self.prompts))
            correct += int((logits.argmax(dim=1) == labels).sum())
        return correct / len(self.test)


_EXPORT_BATCH = 100


def give_images(settings: RunPlan, data_dir: Path) -> None:
    """Put the images that a run distils on into the folder of its server, before it starts.

    Raises:
        DataError: there is no data set of that name.
    """
    how = settings.distillation
    if how.epochs == 0 or how.images == "random":
        return
    held = load_dataset(how.images, seed=0).train
    generator = torch.Generator().manual_seed(derive_seed(0, "distillation-images"))
    chosen = torch.randperm(len(held), generator=generator)[: how.samples]
    pixels = torch.stack([held.image(int(one)) for one in chosen])  # [N, 3, H, W]
    write_tensors(data_dir / IMAGES / f"{how.images}.safetensors", {"images": pixels})


def plugged_in_accuracy(
    settings: RunPlan, state: Mapping[str, Tensor], data: Dataset, cache_dir: Path
) -> float:
    """A share of 1: of the held-out images, by the backbone with a run's final state.

    Args:
        settings: of the run, which was on a proxy.
        state: its last global state.
        data: all devices' images together.
        cache_dir: where the run's server has its backbones.
    """
    split, whole = plugged(settings.model, state)
    backbone = prepare_backbone(split, settings.model.weights, cache_dir)
    model = TunedModel(split, open_backbone(backbone.path), whole)
    return _accuracy(model, data.test)


@torch.no_grad()
def _accuracy(model: TunedModel, held_out: ImageSet) -> float:
    way = preprocessing_of(model.settings, image_preparation(model.settings))
    images, correct = BatchReader(held_out, way, cache_bytes=0), 0
    for positions in torch.arange(len(images)).split(_EXPORT_BATCH):
        pixels, labels = images.read(positions)
        correct += int((model(pixels).argmax(dim=1) == labels).sum())
    return correct / len(images)


def of_backbone(figures: Figures, accuracy: float) -> Figures:
    """The figures of a run on a proxy, with the backbone's accuracy for the proxy's.

    Devices measure the proxy in every round, the backbone is measured once, at the end: the curve
    has its one point there. What devices measured last stands beside it.
    """
    curve = [{**point, "accuracy": None} for point in figures["curve"]]
    if curve:
        curve[-1]["accuracy"] = accuracy
    return figures | {
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "accuracy_proxy": figures["accuracy"],
        "accuracy_clients": {},
        "accuracy_worst_client": None,
        "curve": curve,
    }
