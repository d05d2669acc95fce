"""References on pooled data without a gradient: ridge regression and discriminant analysis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.torch_model import read
from protocol.settings import RunSettings
from sfprompt_bench.methods.base import Advance, ReferenceResult
from sfprompt_bench.methods.pooled import BATCH, FrozenFeatures, PooledModel
from sfprompt_bench.methods.shrunk_lda import ShrunkLDA, choose_shrinkage

_DEPTHS = 4

# Penalties of the ridge regression, of a sample's mean squared norm.
_STRENGTHS = tuple(10 ** (step / 4) for step in range(-16, 9))

_SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)

_FOLDS = 5


class _ClosedForm(FrozenFeatures):
    """A classifier in closed form on frozen features of one or several depths.

    Attributes:
        num_depths: after how many of the blocks features are read; 1: the classifier's input.
    """

    num_depths: ClassVar[int] = 1

    def measure(self, settings: RunSettings, data: Dataset, advance: Advance) -> ReferenceResult:
        model = PooledModel(settings.plan, data)
        depths = evenly_spaced(model.tail.sizes.depth, self.num_depths)
        if self.num_depths == 1:
            train, test = model.features_of(model.train), model.features_of(model.test)
        else:
            train = features_at(model, model.train, depths)
            test = features_at(model, model.test, depths)
        accuracy, chosen = self.fit(train, test)
        weights = settings.model.num_classes * (train[0].shape[1] + 1)
        return ReferenceResult(accuracy, weights, {"depths": list(depths), **chosen})

    @abstractmethod
    def fit(
        self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> tuple[float, Mapping[str, Any]]:
        """Fit to features [N, D] and labels [N]; return the test accuracy and what was chosen.

        Test data must have no effect on the choice.
        """


class RidgeProbe(_ClosedForm):
    """Ridge regression on the classes, one-hot; its penalty by leave-one-out on training data."""

    name = "ridge-probe"
    what = "ridge regression on frozen features of the last block, of the pooled data"

    def fit(
        self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> tuple[float, Mapping[str, Any]]:
        return fit_ridge(train, test)


class LDAProbe(_ClosedForm):
    """Discriminant analysis; its shrinkage by cross-validation on training data."""

    name = "lda-probe"
    what = "linear discriminant analysis on frozen features of the last block, of the pooled data"

    def fit(
        self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> tuple[float, Mapping[str, Any]]:
        return fit_lda(train, test)


class RidgeDepths(RidgeProbe):
    """Ridge regression on features of four depths."""

    name = "ridge-depths"
    what = "ridge regression on frozen features of four depths, of the pooled data"
    num_depths = _DEPTHS


class LDADepths(LDAProbe):
    """Discriminant analysis on features of four depths."""

    name = "lda-depths"
    what = "linear discriminant analysis on frozen features of four depths, of the pooled data"
    num_depths = _DEPTHS


def evenly_spaced(depth: int, count: int) -> tuple[int, ...]:
    """Choose up to ``count`` numbers of blocks out of 1 to ``depth``, ascending, the last included.

    The first is after a third of the blocks: the tokens of earlier blocks say little about a class.
    """
    first = max(1, -(-depth // 3))
    steps = max(1, count - 1)
    numbers = {depth - (depth - first) * step // steps for step in range(count)}
    return tuple(sorted(numbers))


@torch.no_grad()
def features_at(
    model: PooledModel, samples: BatchReader, depths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Compute features after some blocks: class token, mean and deviation of the image tokens.

    Each is computed on tokens behind the backbone's final norm. A backbone without a class token
    has the other two.

    Args:
        model: with all blocks in the body.
        samples: to compute the features of.
        depths: numbers of blocks, from 1.

    Returns:
        Features [N, F] and labels [N].
    """
    trunk: Any = model.tail.trunk
    # Where timm normalises the pooled token instead, that norm has the same width.
    norm = trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm
    sizes = model.tail.sizes
    features, labels = [], []
    for positions in torch.arange(len(samples)).split(BATCH):
        images, batch_labels = read(samples, positions.numpy())
        at_depths: list[Tensor] = []

        def keep(tokens: Tensor, at_depths: list[Tensor] = at_depths) -> Tensor:
            at_depths.append(tokens)
            return tokens

        model.body.run(model.head(images), 0, after=keep)
        summaries = []
        for depth in depths:
            tokens = norm(at_depths[depth - 1])  # [B, T, D]
            patches = tokens[:, -sizes.patches :]
            summaries += [tokens[:, 0]] if sizes.prefix else []
            summaries += [patches.mean(dim=1), patches.std(dim=1, correction=0)]
        features.append(torch.cat(summaries, dim=1))
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


def fit_ridge(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[float, dict[str, float]]:
    """Fit ridge regression to standardised features; see `_ClosedForm.fit`."""
    # scikit-learn takes seconds to import, which no other method should wait for.
    from sklearn.linear_model import RidgeClassifierCV

    train_features, test_features = standardised(train[0], test[0])
    norm = float(train_features.square().sum(dim=1).mean()) or 1.0
    penalties = [norm * strength for strength in _STRENGTHS]
    ridge = RidgeClassifierCV(alphas=penalties).fit(train_features.numpy(), train[1].numpy())
    accuracy = float(ridge.score(test_features.numpy(), test[1].numpy()))
    return accuracy, {"strength": float(ridge.alpha_) / norm}


def fit_lda(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[float, dict[str, float]]:
    """Fit discriminant analysis to standardised features; see `_ClosedForm.fit`."""
    train_features, test_features = standardised(train[0], test[0])
    shrinkage = choose_shrinkage(train_features, train[1], _SHRINKAGES, _FOLDS)
    fitted = ShrunkLDA.of(train_features, train[1])
    correct = fitted.count_correct(test_features, test[1], shrinkage)
    return correct / len(test[1]), {"shrinkage": shrinkage}


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale features to mean 0 and variance 1 on the training data, in float64."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return (train - mean) / deviation, (test - mean) / deviation
