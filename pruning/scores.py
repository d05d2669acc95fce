"""How much a sample is worth to training, from what the tail makes of it.

Every score has one type, `Score`, and stands in `SCORES` under the name that a run's settings
use. A higher score is a sample more worth keeping. Nothing here needs the body, the network or a
gradient: one forward pass of head and tail is enough.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.errors import InvalidField, WrongShape

__all__ = [
    "SCORES",
    "Score",
    "draw_random_scores",
    "el2n",
    "grand",
    "loss",
    "margin",
    "random",
]


class Score(Protocol):
    """Scores n samples; the higher, the more worth keeping.

    Args:
        logits: the tail's output, (n, C), of any floating-point dtype; half precision is
            computed in float32.
        labels: the true classes, (n,), whole numbers from 0 to C - 1.
        features: the classifier's input, (n, F); needed by `grand` alone.
        generator: the source of chance; needed by `random` alone.

    Returns:
        (n,), on the logits' device, without a gradient. A sample whose logits are not finite has
        a score that is not finite; the selection refuses it.

    Raises:
        WrongShape: the shapes do not belong together.
        InvalidField: a label is not a class, a dtype is wrong, or a needed argument is missing.
    """

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


def el2n(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The length of the error, ‖softmax(logits) − onehot(labels)‖₂, from 0 to √2.

    The score of SFPrompt's pruning (arXiv 2407.17533, section 3), defined as EL2N in Paul et al.
    (arXiv 2107.07075, section 2). Types and errors: see `Score`.
    """
    return _error(*_checked(logits, labels)).square().sum(dim=1).sqrt()  # (n,)


def grand(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The length of the loss's gradient with respect to the classifier's weight and bias.

    GraNd of Paul et al. (arXiv 2107.07075, section 2), restricted to the last layer. With the
    error e = softmax(logits) − onehot(labels) and the classifier's input f, the gradient of the
    cross-entropy is the outer product e fᵀ for the weight and e for the bias; its length is
    ‖e‖₂ · √(‖f‖₂² + 1). Types and errors: see `Score`.
    """
    length = el2n(logits, labels)  # (n,)
    if features is None:
        raise InvalidField("grand needs the classifier's input", field="features")
    if features.ndim != 2 or features.shape[0] != logits.shape[0]:
        raise WrongShape(
            "the features are one row for each sample",
            field="features",
            limit=[logits.shape[0], "F"],
            value=list(features.shape),
        )
    squares = features.detach().to(length.dtype).square().sum(dim=1)  # (n,)
    return length * (squares + 1).sqrt()


def margin(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The best other class's logit less the true class's: above 0 is a mistake.

    The negative log-odds of the true class against its strongest rival. Unlike a difference of
    probabilities it does not saturate, so that confident samples still have an order.
    Types and errors: see `Score`; there must be at least two classes.
    """
    logits, labels = _checked(logits, labels)
    if logits.shape[1] < 2:
        raise WrongShape(
            "a margin needs two classes", field="logits", limit=2, value=logits.shape[1]
        )
    column = labels.unsqueeze(1)  # (n, 1)
    true = logits.gather(1, column).squeeze(1)  # (n,)
    rival = logits.scatter(1, column, -torch.inf).amax(dim=1)  # (n,)
    return rival - true


def loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The cross-entropy of each sample, in nats. Types and errors: see `Score`."""
    logits, labels = _checked(logits, labels)
    return F.cross_entropy(logits, labels, reduction="none")  # (n,)


def random(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniform from 0 to 1, whatever the sample: what the other scores have to beat.

    The draw depends on the generator and on n alone. Types and errors: see `Score`.
    """
    logits, _ = _checked(logits, labels)
    if generator is None:
        raise InvalidField("random needs a seeded generator", field="generator")
    return draw_random_scores(logits.shape[0], generator).to(logits.device)


def draw_random_scores(samples: int, generator: torch.Generator) -> Tensor:
    """The scores (samples,) of `random`, for whoever has no logits: it needs none."""
    return torch.rand(samples, generator=generator, device=generator.device)  # (n,)


SCORES: dict[str, Score] = {
    "el2n": el2n,
    "grand": grand,
    "margin": margin,
    "loss": loss,
    "random": random,
}


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) − onehot(labels), (n, C).

    The true class's entry is minus the sum of the others: 1 − p would lose all digits of a
    confident sample, and make ties of what has an order.
    """
    column = labels.unsqueeze(1)  # (n, 1)
    others = logits.softmax(dim=1).scatter(1, column, 0.0)  # (n, C), zero at the true class
    return others.scatter(1, column, -others.sum(dim=1, keepdim=True))


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise WrongShape(
            "logits are one row of classes for each sample",
            field="logits",
            limit=["n", "C"],
            value=list(logits.shape),
        )
    if not logits.is_floating_point():
        raise InvalidField("logits are floating-point", field="logits", value=str(logits.dtype))
    if labels.shape != logits.shape[:1]:
        raise WrongShape(
            "there is one label for each sample",
            field="labels",
            limit=[logits.shape[0]],
            value=list(labels.shape),
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidField("labels are whole numbers", field="labels", value=str(labels.dtype))
    classes = logits.shape[1]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InvalidField(
            "a label is not a class",
            field="labels",
            limit=[0, classes - 1],
            value=[int(labels.min()), int(labels.max())],
        )
    logits = logits.detach()
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits, labels.to(device=logits.device, dtype=torch.int64)
