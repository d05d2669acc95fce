"""The results of a start: the basis with the sums of all features, then the classifier in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from protocol.plan import RunPlan
from split_model.parts.depths import feature_shape, read_blocks
from split_server.closed_form.basis import Basis, Moments, fit_basis, read_basis
from split_server.closed_form.classifier import FeatureSums, RidgeClassifier
from split_server.closed_form.sample_features import SampleFeatures, all_chunks
from split_server.storage.tensor_files import read_tensors, write_named_tensors


@dataclass(frozen=True)
class Fitted:
    """The basis of all participants' features, and their sums in it."""

    basis: Basis
    sums: FeatureSums


@dataclass(frozen=True)
class Solved:
    """The result of a start, which is on disk before any participant learns it.

    Attributes:
        basis: of the features.
        classifier: the ridge regression.
        mean: of all participants' features, [r], float64, also of those that do not count.
        variances: of these features, [r], float64.
    """

    basis: Basis
    classifier: RidgeClassifier
    mean: Tensor
    variances: Tensor


@dataclass(frozen=True)
class Features:
    """A participant's features, and the mean and variances of all participants'.

    Attributes:
        values: [n, 1, r].
        mean: [r], float64.
        variances: [r], float64.
        strength: of the ridge regression, for each sample; 0 before it is solved.
    """

    values: Tensor
    mean: Tensor
    variances: Tensor
    strength: float = 0.0


def fit_features(moments: Moments, plan: RunPlan, features: Sequence[SampleFeatures]) -> Fitted:
    """Fit the basis, and sum the features as the devices will decode them."""
    _, rank = feature_shape(plan.model)
    basis = fit_basis(moments, rank, len(read_blocks(plan.model)))
    return Fitted(basis, sum_features(basis, features, plan.wire.start))


def sum_features(basis: Basis, features: Sequence[SampleFeatures], codec: str) -> FeatureSums:
    """Sum the participants' features as the devices decode them."""
    rank = len(basis.scale)
    total = torch.zeros(rank, dtype=torch.float64)
    products = torch.zeros(rank, rank, dtype=torch.float64)
    count = 0
    for chunk in all_chunks(features):
        decoded = as_decoded(basis.project(chunk[:, None]), codec).flatten(1).double()
        total += decoded.sum(dim=0)
        products += decoded.T @ decoded
        count += len(decoded)
    centred = products - torch.outer(total, total) / max(1, count)
    return FeatureSums(count, total / max(1, count), centred)


def project_all(basis: Basis, features: SampleFeatures) -> Tensor:
    """Return a participant's features [n, 1, r]."""
    return torch.cat([basis.project(chunk[:, None]) for chunk in features.chunks()])


def decode_all(basis: Basis, features: SampleFeatures, codec: str) -> Tensor:
    """Return a participant's features as it decodes them, [n, r]."""
    chunks = (basis.project(chunk[:, None]) for chunk in features.chunks())
    return torch.cat([as_decoded(chunk, codec).flatten(1) for chunk in chunks])


def write_solved(path: Path, solved: Solved) -> None:
    """Write a result; it is durable on return."""
    basis, classifier = solved.basis, solved.classifier
    tensors = {
        "mean": basis.mean,
        "vectors": basis.vectors,
        "scale": basis.scale,
        "classifier.weight": classifier.weight,
        "classifier.bias": classifier.bias,
        "classifier.mean": classifier.mean,
        "classifier.influence": classifier.influence,
        "classifier.count": torch.tensor(classifier.count),
        "classifier.strength": torch.tensor(classifier.strength, dtype=torch.float64),
        "features.mean": solved.mean.clone(),  # a file has no shared memory
        "features.variances": solved.variances,
    }
    write_named_tensors(path, tensors)


def read_solved(path: Path) -> Solved:
    """Read what `write_solved` wrote.

    Raises:
        DamagedFile: it is not what was written.
        OSError: the file cannot be read.
    """
    tensors = read_tensors(path)
    classifier = RidgeClassifier(
        weight=tensors["classifier.weight"],
        bias=tensors["classifier.bias"],
        mean=tensors["classifier.mean"],
        influence=tensors["classifier.influence"],
        count=int(tensors["classifier.count"]),
        strength=float(tensors["classifier.strength"]),
    )
    basis = read_basis(path, torch.device("cpu"))
    return Solved(basis, classifier, tensors["features.mean"], tensors["features.variances"])
