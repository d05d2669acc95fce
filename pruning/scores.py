"""Scores of samples by their value for training, from one forward pass of head and tail.

All scores have the type `Score`; `SCORES` lists them by the names in a run's settings. A higher
score marks a more valuable sample. No score needs the body, the network or a backward pass.
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
    """The type of all scores: a function that scores N samples.

    Args:
        logits: the tail's output, [N, C], any floating-point dtype; half precision is computed in
            float32.
        labels: the true classes, [N], integers from 0 to C - 1.
        features: the classifier's input, [N, F]; only for `grand`.
        generator: the source of random numbers; only for `random`.

    Returns:
        [N], on the logits' device, without gradient. The score of a sample with non-finite logits
        is not finite; `select_highest` refuses it.

    Raises:
        WrongShape: the shapes do not fit each other.
        InvalidField: a label is not a class, a dtype is wrong, or an argument is missing.
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
    """Return the norm of the error, ‖softmax(logits) − onehot(labels)‖₂, from 0 to √2.

    Arguments and errors: see `Score`.

    Source: EL2N, arXiv 2107.07075, section 2; used by SFPrompt, arXiv 2407.17533, section 3.
    """
    return _compute_error(*_validate(logits, labels)).square().sum(dim=1).sqrt()  # [N]


def grand(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the norm of the loss's gradient with respect to the classifier's weight and bias.

    With the error e = softmax(logits) − onehot(labels) and the classifier's input f, the gradient
    of the cross-entropy is the outer product e fᵀ for the weight and e for the bias; its norm is
    ‖e‖₂ · √(‖f‖₂² + 1). Arguments and errors: see `Score`.

    Source: GraNd, arXiv 2107.07075, section 2, restricted to the last layer.
    """
    error_norm = el2n(logits, labels)  # [N]
    if features is None:
        raise InvalidField("the score grand needs the classifier's input", field="features")
    if features.ndim != 2 or features.shape[0] != logits.shape[0]:
        raise WrongShape(
            "features must have one row for each sample",
            field="features",
            limit=[logits.shape[0], "F"],
            value=list(features.shape),
        )
    squares = features.detach().to(error_norm.dtype).square().sum(dim=1)  # [N]
    return error_norm * (squares + 1).sqrt()


def margin(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the highest logit of another class minus the true class's; above 0 if misclassified.

    These are the negative log-odds of the true class against the strongest other class. Unlike a
    difference of probabilities, they do not saturate: confident samples still have an order.
    Arguments and errors: see `Score`; at least two classes.
    """
    logits, labels = _validate(logits, labels)
    if logits.shape[1] < 2:
        raise WrongShape(
            "the score margin needs at least two classes",
            field="logits",
            limit=2,
            value=logits.shape[1],
        )
    column = labels.unsqueeze(1)  # [N, 1]
    true_logit = logits.gather(1, column).squeeze(1)  # [N]
    other_logit = logits.scatter(1, column, -torch.inf).amax(dim=1)  # [N]
    return other_logit - true_logit


def loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the cross-entropy of each sample, in nats. Arguments and errors: see `Score`."""
    logits, labels = _validate(logits, labels)
    return F.cross_entropy(logits, labels, reduction="none")  # [N]


def random(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return uniform numbers from 0 to 1, the baseline of the other scores.

    They depend only on the generator and on N. Arguments and errors: see `Score`.
    """
    logits, _ = _validate(logits, labels)
    if generator is None:
        raise InvalidField("the score random needs a seeded generator", field="generator")
    return draw_random_scores(logits.shape[0], generator).to(logits.device)


def draw_random_scores(samples: int, generator: torch.Generator) -> Tensor:
    """Return the scores of `random`, [samples], without computing logits."""
    return torch.rand(samples, generator=generator, device=generator.device)  # [N]


SCORES: dict[str, Score] = {
    "el2n": el2n,
    "grand": grand,
    "margin": margin,
    "loss": loss,
    "random": random,
}


def _compute_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return softmax(logits) − onehot(labels), [N, C].

    The true class's entry is minus the sum of the others: p − 1 would cancel all digits of a
    confident sample, so that different samples would tie.
    """
    column = labels.unsqueeze(1)  # [N, 1]
    others = logits.softmax(dim=1).scatter(1, column, 0.0)  # [N, C], zero at the true class
    return others.scatter(1, column, -others.sum(dim=1, keepdim=True))


def _validate(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check logits and labels; return logits in at least float32 and labels as int64."""
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise WrongShape(
            "logits must have one row for each sample and one column for each class",
            field="logits",
            limit=["N", "C"],
            value=list(logits.shape),
        )
    if not logits.is_floating_point():
        raise InvalidField("logits must be floating-point", field="logits", value=str(logits.dtype))
    if labels.shape != logits.shape[:1]:
        raise WrongShape(
            "labels must have one entry for each sample",
            field="labels",
            limit=[logits.shape[0]],
            value=list(labels.shape),
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidField("labels must be integers", field="labels", value=str(labels.dtype))
    classes = logits.shape[1]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InvalidField(
            "a label is not the number of a class",
            field="labels",
            limit=[0, classes - 1],
            value=[int(labels.min()), int(labels.max())],
        )
    logits = logits.detach()
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits, labels.to(device=logits.device, dtype=torch.int64)
