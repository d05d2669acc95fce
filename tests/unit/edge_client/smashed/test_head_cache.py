"""The head's output: computed once, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.torch_model import TorchModel
from tests.support.edge import device_model
from tests.support.heads import (
    AT_CUT,
    PLENTY,
    SAMPLES,
    TOKENS,
    WIDTH,
    everything,
    outputs,
    reader,
    shared_model,
)


@pytest.fixture
def model() -> TorchModel:
    return shared_model()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(model: TorchModel) -> Iterator[list[Tensor]]:
    """Every batch of images that goes through the head."""
    seen: list[Tensor] = []

    def remember(_head: object, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0].clone())

    hook = model.head.register_forward_pre_hook(remember)
    yield seen
    hook.remove()


def positions_in(runs: list[Tensor], images: BatchReader) -> set[int]:
    """Which samples are among these batches of images."""
    known = images.read(range(len(images)))[0]
    return {
        int(np.flatnonzero((known == image.numpy()).all(axis=(1, 2, 3)))[0])
        for batch in runs
        for image in batch
    }


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.usefixtures("threads")
def test_a_sample_has_the_same_bits_in_any_company_and_order(model: TorchModel) -> None:
    together = outputs(model).smashed(np.arange(SAMPLES))
    assert together.shape == (SAMPLES, TOKENS, WIDTH)
    order = np.random.default_rng(0).permutation(SAMPLES)
    companies = [
        order[start : start + size]
        for size in (1, 5, 16, 30)
        for start in range(0, 9 if size == 1 else SAMPLES, size)
    ]
    companies.append(np.array([4, 4, 0, 36, 4]))
    for positions in companies:
        fresh = outputs(model)
        assert np.array_equal(fresh.smashed(positions), together[positions])
        assert np.array_equal(fresh.for_tail(positions), together[positions, :1])
    plain = model.smashed(reader(model).read(range(SAMPLES))[0])
    np.testing.assert_allclose(together, plain, rtol=1e-5, atol=1e-5)


def test_the_head_runs_once_for_what_the_tail_reads(model: TorchModel, runs: list[Tensor]) -> None:
    images = reader(model)
    head_outputs = HeadOutputs(model, images, PLENTY)
    head_outputs.for_tail(np.arange(10))
    assert positions_in(runs, images) == set(range(10))
    runs.clear()
    head_outputs.for_tail(np.arange(5, 20))
    assert positions_in(runs, images) == set(range(10, 20))
    head_outputs.smashed(np.arange(20, SAMPLES))
    runs.clear()
    for _ in range(3):
        head_outputs.for_tail(np.arange(SAMPLES)[::-1])
    assert runs == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=20), max_size=4))
def test_each_sample_gets_its_own_output_in_any_order(
    requests: list[list[int]],
) -> None:
    head_outputs, together = outputs(shared_model()), everything()
    for number, positions in enumerate(requests):
        chosen = np.array(positions)
        if number % 2:
            assert np.array_equal(head_outputs.smashed(chosen), together[chosen])
        assert np.array_equal(head_outputs.for_tail(chosen), together[chosen, :1])


def test_outputs_beyond_the_cache_are_computed_each_time(
    model: TorchModel, runs: list[Tensor]
) -> None:
    together = everything()
    small = outputs(model, cache_bytes=SAMPLES * WIDTH * 4 - 1)
    runs.clear()
    for _ in range(2):
        assert np.array_equal(small.for_tail(np.arange(8)), together[:8, :1])
    assert len(runs) == 2
    enough = outputs(model, cache_bytes=SAMPLES * WIDTH * 4)
    runs.clear()
    for _ in range(2):
        enough.for_tail(np.arange(8))
    assert len(runs) == 1


def test_a_tail_with_blocks_reads_every_token() -> None:
    model = device_model(AT_CUT.model_copy(update={"tail_blocks": 1}))
    head_outputs = outputs(model)
    tokens = head_outputs.for_tail(np.arange(8))
    assert tokens.shape == (8, TOKENS, WIDTH)
    assert np.array_equal(tokens, head_outputs.smashed(np.arange(8)))


def test_views_are_of_their_own(model: TorchModel, runs: list[Tensor]) -> None:
    head_outputs, images = outputs(model, augmented=True), reader(model, augmented=True)
    positions = np.arange(20)
    plain = head_outputs.for_tail(positions)
    runs.clear()
    seen = [head_outputs.for_tail(positions, view) for view in (0, 1, 0)]
    assert len(runs) == 6, "views are not remembered"
    for view, tokens in zip((0, 1, 0), seen, strict=True):
        expected = model.smashed(images.read(positions, epoch=view)[0])
        np.testing.assert_allclose(tokens, expected[:, :1], rtol=1e-5, atol=1e-5)
    assert np.array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])
    assert np.array_equal(head_outputs.for_tail(positions), plain)
    one_by_one = np.concatenate(
        [head_outputs.smashed(position, 1) for position in positions[:, None]]
    )
    assert np.array_equal(one_by_one, head_outputs.smashed(positions, 1))
