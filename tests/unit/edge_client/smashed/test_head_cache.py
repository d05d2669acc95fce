"""The head's output: computed once, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.model import DeviceModel
from edge_client.smashed.head_cache import HeadOutputs
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
def model() -> DeviceModel:
    return shared_model()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(model: DeviceModel) -> Iterator[list[Tensor]]:
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
        int((known == image).flatten(1).all(dim=1).nonzero()) for batch in runs for image in batch
    }


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.usefixtures("threads")
def test_a_sample_has_the_same_bits_in_any_company_and_order(model: DeviceModel) -> None:
    together = outputs(model).smashed(torch.arange(SAMPLES))
    assert together.shape == (SAMPLES, TOKENS, WIDTH)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    companies = [*order.split(1)[:9], *order.split(5), *order.split(16), *order.split(30)]
    companies.append(torch.tensor([4, 4, 0, 36, 4]))
    for positions in companies:
        fresh = outputs(model)
        assert torch.equal(fresh.smashed(positions), together[positions])
        assert torch.equal(fresh.for_tail(positions), together[positions, :1])
    plain = model.head(reader(model).read(range(SAMPLES))[0])
    torch.testing.assert_close(together, plain, rtol=1e-5, atol=1e-5)
    assert not together.requires_grad


def test_the_head_runs_once_for_what_the_tail_reads(model: DeviceModel, runs: list[Tensor]) -> None:
    images = reader(model)
    head_outputs = HeadOutputs(model.head, images, PLENTY)
    head_outputs.for_tail(torch.arange(10))
    assert positions_in(runs, images) == set(range(10))
    runs.clear()
    head_outputs.for_tail(torch.arange(5, 20))
    assert positions_in(runs, images) == set(range(10, 20))
    head_outputs.smashed(torch.arange(20, SAMPLES))
    runs.clear()
    for _ in range(3):
        head_outputs.for_tail(torch.arange(SAMPLES).flip(0))
    assert runs == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=20), max_size=4))
def test_each_sample_gets_its_own_output_in_any_order(
    requests: list[list[int]],
) -> None:
    head_outputs, together = outputs(shared_model()), everything()
    for number, positions in enumerate(requests):
        chosen = torch.tensor(positions)
        if number % 2:
            assert torch.equal(head_outputs.smashed(chosen), together[chosen])
        assert torch.equal(head_outputs.for_tail(chosen), together[chosen, :1])


def test_outputs_beyond_the_cache_are_computed_each_time(
    model: DeviceModel, runs: list[Tensor]
) -> None:
    together = everything()
    small = outputs(model, cache_bytes=SAMPLES * WIDTH * 4 - 1)
    runs.clear()
    for _ in range(2):
        assert torch.equal(small.for_tail(torch.arange(8)), together[:8, :1])
    assert len(runs) == 2
    enough = outputs(model, cache_bytes=SAMPLES * WIDTH * 4)
    runs.clear()
    for _ in range(2):
        enough.for_tail(torch.arange(8))
    assert len(runs) == 1


def test_a_tail_with_blocks_reads_every_token() -> None:
    model = device_model(AT_CUT.model_copy(update={"tail_blocks": 1}))
    head_outputs = outputs(model)
    tokens = head_outputs.for_tail(torch.arange(8))
    assert tokens.shape == (8, TOKENS, WIDTH)
    assert torch.equal(tokens, head_outputs.smashed(torch.arange(8)))


def test_views_are_of_their_own(model: DeviceModel, runs: list[Tensor]) -> None:
    head_outputs, images = outputs(model, augmented=True), reader(model, augmented=True)
    positions = torch.arange(20)
    plain = head_outputs.for_tail(positions)
    runs.clear()
    seen = [head_outputs.for_tail(positions, view) for view in (0, 1, 0)]
    assert len(runs) == 6, "views are not remembered"
    for view, tokens in zip((0, 1, 0), seen, strict=True):
        expected = model.head(images.read(positions, epoch=view)[0])
        torch.testing.assert_close(tokens, expected[:, :1], rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(head_outputs.for_tail(positions), plain)
    one_by_one = torch.cat([head_outputs.smashed(position, 1) for position in positions.split(1)])
    assert torch.equal(one_by_one, head_outputs.smashed(positions, 1))
