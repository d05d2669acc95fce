"""References on the pooled data of all devices: the ceiling and the floor of a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_client.data.batches import BatchReader, shuffled
from edge_client.data.dataset import Dataset
from edge_client.data.download import cache_dir
from edge_client.model import preprocessing_of
from edge_client.torch_model import read
from protocol.federation import FederationSettings
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from protocol.settings import RunSettings
from sfprompt_bench.methods.base import FLOAT32, Advance, Reference, ReferenceResult
from sfprompt_bench.presets import Changes
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.metadata import image_preparation
from split_model.checkpoints.state import head_tensors, initial_state, tail_tensors
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_model.parts.body import Body
from split_model.parts.build import Layered, build_body, build_head, build_tail
from split_model.parts.head import Head
from split_model.parts.tail import Tail

BATCH = 200  # images of a forward pass

_CACHE_BYTES = 2**30

_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # of the probe's regularisation


# Settings without effect on pooled data are fixed, so that a sweep over them tunes once.
_SAMPLES = {"pruning": "random", "prune_per_class": False}
_FEDERATION = {
    "min_participants": 1,
    "evaluate_every": 0,
    "dp_clip": None,
    "dp_noise_multiplier": 0.0,
    "dp_seed": None,
}


class Central(Reference):
    """The prompts and tail of `sfprompt`, tuned in one process on the pooled data."""

    name = "central"
    what = "the ceiling: the prompts and tail of sfprompt, tuned on the pooled data"
    tuning = "sfprompt"
    fixed: ClassVar[Changes] = {
        "method": {**_SAMPLES, "keep_smashed": False},
        "federation": _FEDERATION,
        "wire": FLOAT32,
    }

    def measure(self, settings: RunSettings, data: Dataset, advance: Advance) -> ReferenceResult:
        model = PooledModel(settings.plan, data)
        return ReferenceResult(model.tune(advance), model.trainable_parameters)


class CentralPaper(Central):
    """The prompts and tail of `sfprompt-paper`, tuned in one process on the pooled data."""

    name = "central-paper"
    what = "the prompts and tail of sfprompt-paper, tuned on the pooled data"
    tuning = "sfprompt-paper"
    fixed: ClassVar[Changes] = {
        "method": {**_SAMPLES, "delta_smashed": None, "skip_below": 0, "gradient_correction": 0},
        "federation": _FEDERATION,
        "wire": FLOAT32,
    }


class FrozenFeatures(Reference):
    """A classifier on the frozen features of the pooled data: only the backbone has an effect."""

    tuning = "sfprompt-paper"
    fixed: ClassVar[Changes] = {"method": {"cut": 0, "prompt_count": 0}}

    @property
    def fields(self) -> set[str]:
        return set()

    def settings(self, base: RunSettings, given: Changes | None = None) -> RunSettings:
        parts = {part: fields for part, fields in (given or {}).items() if part != "method"}
        checked = super().settings(base, parts)
        # A sweep over other settings measures once.
        return RunSettings.model_validate(
            {
                "name": checked.name,
                "seed": checked.seed,
                "class_names": checked.class_names,
                "method": {"name": self.tuning, **self.fixed["method"]},
                "model": checked.model,
                "federation": FederationSettings(rounds=1),
            }
        )


class LinearProbe(FrozenFeatures):
    """Logistic regression on the frozen features, the best of four strengths."""

    name = "linear-probe"
    what = "the floor: logistic regression on frozen features of the pooled data"

    def measure(self, settings: RunSettings, data: Dataset, advance: Advance) -> ReferenceResult:
        model = PooledModel(settings.plan, data)
        weights = settings.model.num_classes * (model.tail.sizes.width + 1)
        return ReferenceResult(model.probe(), weights)


class PooledModel:
    """Head, body and tail of a run in one process, with the pooled data.

    Args:
        plan: of the run.
        data: all devices' images together.
    """

    def __init__(self, plan: RunPlan, data: Dataset) -> None:
        split = plan.model
        backbone = prepare_backbone(split, split.weights, cache_dir() / "backbones")
        weights = open_backbone(backbone.path)
        self.plan = plan
        self.body: Body = build_body(split, weights)
        state = initial_state(split, weights, derive_seed(plan.seed, "initial-state"))
        self.head: Head = build_head(split, Layered(head_tensors(state), weights))
        self.tail: Tail = build_tail(split, Layered(tail_tensors(state), weights))
        self.prompts = nn.Parameter(state["prompts"]) if split.prompt_count else None
        preprocessing = preprocessing_of(split, image_preparation(split))
        self.train = BatchReader(data.train, preprocessing, cache_bytes=_CACHE_BYTES)
        self.test = BatchReader(data.test, preprocessing, cache_bytes=_CACHE_BYTES)

    @property
    def trainable_parameters(self) -> int:
        """Count what is tuned of prompts, tail and head."""
        parameters = [*self.head.parameters(), *self.tail.parameters()]
        tuned = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return tuned + (0 if self.prompts is None else self.prompts.numel())

    def tune(self, advance: Advance) -> float:
        """Tune prompts and tail on the pooled data and return the test accuracy.

        It trains on as many samples as the run's devices do through the server (rounds × split
        epochs × keep fraction passes), with the same optimiser, rates and schedule. There are no
        rounds: nothing is averaged, and each pass is over all samples.
        """
        training, rounds = self.plan.training, self.plan.federation.rounds
        optimizer = make_optimizer(training, self.prompts, self.tail, head=self.head)
        epochs = max(1, round(rounds * training.split_epochs * training.keep_fraction))
        seed = derive_seed(self.plan.seed, "centralised")
        batches = list(
            itertools.chain.from_iterable(
                shuffled(len(self.train), training.batch_size, seed, epoch)
                for epoch in range(epochs)
            )
        )
        for step, positions in enumerate(batches):
            set_progress(optimizer, learning_rate_factor(training, step / len(batches), rounds))
            images, labels = read(self.train, positions)
            loss = F.cross_entropy(self.tail(self._features(images, self.prompts)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(step + 1, len(batches))
        return self._accuracy()

    def probe(self) -> float:
        """Fit logistic regression to the frozen features, without prompts; return test accuracy.

        The best of four strengths of regularisation by test accuracy, which favours the probe.
        """
        # scikit-learn takes seconds to import, which no other method should wait for.
        from sklearn.linear_model import LogisticRegression

        train, train_labels = self.features_of(self.train)
        test, test_labels = self.features_of(self.test)
        return max(
            float(
                LogisticRegression(C=strength, max_iter=2000)
                .fit(train.numpy(), train_labels.numpy())
                .score(test.numpy(), test_labels.numpy())
            )
            for strength in _STRENGTHS
        )

    @torch.no_grad()
    def features_of(
        self, samples: BatchReader, change: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the classifier's inputs [N, F] without prompts, and read the labels [N].

        Args:
            samples: the images.
            change: is applied to the images [B, 3, H, W] before; None: nothing is.
        """
        pooled, labels = [], []
        for positions in torch.arange(len(samples)).split(BATCH):
            images, batch_labels = read(samples, positions.numpy())
            changed = images if change is None else change(images)
            pooled.append(self.tail.pool(self._features(changed, None)))
            labels.append(batch_labels)
        return torch.cat(pooled), torch.cat(labels)

    def _features(self, images: Tensor, prompts: Tensor | None) -> Tensor:
        at_cut = self.plan.model.prompt_at == "cut"
        smashed = self.head(images, None if at_cut else prompts)
        num_tokens = None if self.body.sizes.averaged else self.tail.num_tokens
        features: Tensor = self.body(smashed, prompts if at_cut else None, num_tokens)
        return features

    @torch.no_grad()
    def _accuracy(self) -> float:
        correct = 0
        for positions in torch.arange(len(self.test)).split(BATCH):
            images, labels = read(self.test, positions.numpy())
            logits: Tensor = self.tail(self._features(images, self.prompts))
            correct += int((logits.argmax(dim=1) == labels).sum())
        return correct / len(self.test)
