"""The basis equals scikit-learn's principal components, and its transpose is its gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from split_server.closed_form.basis import Basis, Moments, fit_basis, read_basis
from split_server.closed_form.sample_features import SampleFeatures
from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT
from split_server.storage.tensor_files import write_named_tensors

DEPTHS, TOKENS, WIDTH, RANK = 2, 4, 6, 8


def tokens(samples: int = 60, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, 10, generator=generator) @ torch.randn(
        10, TOKENS * WIDTH, generator=generator
    )
    return (5 + mixed).reshape(samples, TOKENS, WIDTH)


def moments_of(samples: Tensor, batch: int = 7) -> Moments:
    moments = Moments(TOKENS * WIDTH)
    for part in samples.flatten(1).split(batch):
        moments.add(part)
    return moments


def fitted(samples: Tensor, depths: int = 1) -> Basis:
    return fit_basis(moments_of(samples), RANK, depths)


def test_moments_are_numpys_mean_and_covariance_for_any_batches() -> None:
    samples = tokens()
    flat = samples.flatten(1).double().numpy()
    for batch in (7, 60):
        moments = moments_of(samples, batch)
        np.testing.assert_allclose(moments.mean(), flat.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(
            moments.covariance(), np.cov(flat.T, bias=True), atol=1e-4, rtol=1e-5
        )


def standardised(samples: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return StandardScaler().fit_transform(samples.flatten(1).double().numpy())


def test_the_unscaled_features_are_the_principal_components_of_scikit_learn() -> None:
    samples = tokens()
    basis = fitted(samples)
    features = basis.project(samples).flatten(1) / basis.scale.float()
    reference = PCA(RANK).fit_transform(standardised(samples))
    np.testing.assert_allclose(features.abs(), np.abs(reference), atol=2e-3)


def test_a_feature_has_the_square_root_of_its_components_variance() -> None:
    samples = tokens()
    variances = PCA(RANK).fit(standardised(samples)).explained_variance_ * 59 / 60
    features = fitted(samples).project(samples).flatten(1)
    np.testing.assert_allclose(features.var(dim=0, unbiased=False), variances**0.5, rtol=1e-3)


def test_components_of_several_depths_hold_almost_the_same_variance() -> None:
    samples = tokens()
    reference = PCA(RANK).fit(standardised(samples)).explained_variance_ratio_.sum()
    basis = fitted(samples, DEPTHS)
    features = basis.project(samples).flatten(1) / basis.scale.float()
    share = features.var(dim=0, unbiased=False).sum() / (TOKENS * WIDTH)
    assert reference - 0.02 < share < reference + 1e-4


def test_components_beyond_the_datas_rank_are_zero() -> None:
    samples = tokens(samples=4)
    features = fitted(samples).project(samples).flatten(1)
    assert torch.count_nonzero(features.abs().amax(dim=0)) == 3


def test_the_gradient_goes_back_as_autograd_sends_it() -> None:
    samples = tokens().requires_grad_()
    basis = fitted(samples.detach())
    gradient = torch.randn(60, 1, RANK, generator=torch.Generator().manual_seed(1))
    basis.project(samples).backward(gradient)
    assert samples.grad is not None
    torch.testing.assert_close(basis.project_back(gradient, WIDTH), samples.grad)


def test_a_tail_without_the_basis_gives_the_same_logits() -> None:
    samples, generator = tokens(), torch.Generator().manual_seed(2)
    basis = fitted(samples)
    state = {
        TAIL_WEIGHT: torch.randn(3, RANK, generator=generator),
        TAIL_BIAS: torch.randn(3, generator=generator),
    }
    plain = basis.without_basis(state)
    torch.testing.assert_close(
        samples.flatten(1) @ plain[TAIL_WEIGHT].T + plain[TAIL_BIAS],
        basis.project(samples).flatten(1) @ state[TAIL_WEIGHT].T + state[TAIL_BIAS],
        atol=1e-3,
        rtol=1e-4,
    )


def test_a_basis_survives_its_file(tmp_path: Path) -> None:
    basis = fitted(tokens())
    path = tmp_path / "basis.safetensors"
    tensors = {"mean": basis.mean, "vectors": basis.vectors, "scale": basis.scale}
    write_named_tensors(path, tensors)
    read = read_basis(path, torch.device("cpu"))
    torch.testing.assert_close(read.project(tokens()), basis.project(tokens()), rtol=0, atol=0)


def test_sample_features_come_back_in_order_rounded_to_float16(tmp_path: Path) -> None:
    flat = tokens().flatten(1)
    stored = SampleFeatures(tmp_path / "p1", len(flat), flat.shape[1])
    for start, part in enumerate(flat.split(25)):
        stored.write(25 * start, part)
    torch.testing.assert_close(torch.cat(list(stored.chunks())), flat.half().float())
