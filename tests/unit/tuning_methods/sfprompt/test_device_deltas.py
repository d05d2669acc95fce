"""Deltas of smashed data on the device: what is sent, and what is cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from protocol.codecs import get_codec
from protocol.codecs.registry import as_decoded
from protocol.errors import InvalidField
from protocol.settings import RunSettings
from tuning_methods.sfprompt.device_deltas import DeltaBatch, DeltaCache

PLENTY = 10**9

TOKENS, WIDTH = 3, 64


def delta_cache(
    whole: str = "float32",
    changes: str = "float32",
    skip_below: float = 0.0,
    max_bytes: int = PLENTY,
) -> DeltaCache:
    return DeltaCache(whole, changes, skip_below, max_bytes)


def numbers(batch: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """[B, T, D]"""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((batch, TOKENS, WIDTH), generator=generator)


def samples(*positions: int, view: int | None = None) -> list[tuple[int, int | None]]:
    return [(position, view) for position in positions]


def sent(delta: DeltaBatch, name: str) -> Tensor:
    return delta.tensors[name][0]


def visit(cache: DeltaCache, positions: list[int], smashed: Tensor) -> DeltaBatch:
    delta = cache.encode(samples(*positions), smashed)
    cache.confirm(delta)
    return delta


# What is sent


def test_a_sample_is_sent_whole_once_and_then_as_its_change() -> None:
    cache = delta_cache("float16", "int8")
    first, second = numbers(2), numbers(2, seed=1)
    delta = visit(cache, [0, 1], first)
    assert set(delta.tensors) == {"ids", "versions", "whole", "whole_rows"}
    assert delta.tensors["whole"][1] == "float16"
    assert torch.equal(sent(delta, "whole"), first)
    assert sent(delta, "whole_rows").tolist() == [0, 1]
    assert torch.equal(delta.decoded, first.half().float())

    delta = visit(cache, [0, 1], second)
    assert set(delta.tensors) == {"ids", "versions", "changes", "change_rows"}
    assert delta.tensors["changes"][1] == "int8"
    change = second - first.half().float()
    assert torch.equal(sent(delta, "changes"), change)
    scale = change.abs().amax(dim=-1, keepdim=True) / 127
    expected = first.half().float() + (change / scale).round() * scale
    assert torch.equal(delta.decoded, expected)


def test_a_batch_may_contain_new_and_cached_samples() -> None:
    cache = delta_cache()
    visit(cache, [4, 7], numbers(2))
    batch = numbers(4, seed=1)
    delta = visit(cache, [5, 7, 6, 4], batch)
    assert sent(delta, "whole_rows").tolist() == [0, 2]
    assert sent(delta, "change_rows").tolist() == [1, 3]
    assert torch.equal(sent(delta, "whole"), batch[[0, 2]])
    assert torch.equal(sent(delta, "changes"), batch[[1, 3]] - numbers(2)[[1, 0]])
    assert torch.equal(delta.decoded[[0, 2]], batch[[0, 2]])


def test_a_small_change_is_not_sent() -> None:
    """Rows of norm 5 change by 0.3 and by 0.6: 6 % and 12 % (the threshold is 10 %)."""
    cache = delta_cache(skip_below=0.1)
    start = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]]])
    visit(cache, [0, 1], start)
    moved = torch.tensor([[[3.0, 4.3]], [[3.0, 4.6]]])
    delta = visit(cache, [0, 1], moved)
    assert sent(delta, "change_rows").tolist() == [1]
    assert delta.decoded[0].tolist() == [[3.0, 4.0]]
    assert torch.allclose(delta.decoded[1], moved[1])
    # Changes are measured against the server's copy, not against the last visit: they add up.
    delta = visit(cache, [0], torch.tensor([[[3.0, 4.6]]]))
    assert sent(delta, "change_rows").tolist() == [0]


def test_for_unchanged_samples_only_ids_and_versions_are_sent() -> None:
    cache = delta_cache(skip_below=1e-6)
    visit(cache, [0, 1], numbers(2))
    delta = visit(cache, [1, 0], numbers(2)[[1, 0]])
    assert set(delta.tensors) == {"ids", "versions"}
    assert torch.equal(delta.decoded, numbers(2)[[1, 0]])


def test_without_a_threshold_a_change_of_zero_is_sent() -> None:
    cache = delta_cache()
    visit(cache, [0], numbers(1))
    assert not sent(visit(cache, [0], numbers(1)), "changes").any()


def test_numbers_that_a_codec_cannot_represent_change_nothing() -> None:
    cache = delta_cache("float32", "int4")
    visit(cache, [0], numbers(1))
    with pytest.raises(InvalidField):
        cache.encode(samples(0), numbers(1) * torch.inf)
    delta = cache.encode(samples(0), numbers(1, seed=1))
    assert torch.equal(sent(delta, "changes"), numbers(1, seed=1) - numbers(1))


# Errors


@pytest.mark.parametrize("changes", ["int4", "int4-asym", "int8"])
def test_errors_of_codecs_do_not_add_up(changes: str) -> None:
    """Thirty visits with small changes, each encoded with an error."""
    cache = delta_cache("int4", changes)
    smashed = numbers(4)
    alone = float((as_decoded(smashed, changes) - smashed).norm())
    visit(cache, [0, 1, 2, 3], smashed)
    errors = []
    for step in range(30):
        smashed = smashed + numbers(4, seed=step + 1, scale=0.02)
        delta = visit(cache, [0, 1, 2, 3], smashed)
        errors.append(float((delta.decoded - smashed).norm()))
    assert max(errors[2:]) < 0.2 * alone
    assert max(errors[20:]) < 1.5 * max(errors[5:15])


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "pq", "topk:0.1", "int4+zstd"])
def test_as_decoded_equals_the_other_end_s_result(codec: str) -> None:
    tensor = numbers(2)
    received = [memoryview(bytes(buffer)) for buffer in get_codec(codec).encode(tensor)]
    expected = get_codec(codec).decode(received, tensor.shape)
    decoded = as_decoded(tensor, codec)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, expected.float())


# Ids and versions


def test_ids_distinguish_samples_and_views_and_do_not_identify_them() -> None:
    cache, other = delta_cache(), delta_cache()
    named = [*samples(0, 1, 2), *samples(0, 1, view=0), *samples(0, view=1)]
    batch = numbers(len(named))
    ids = sent(cache.encode(named, batch), "ids")
    assert (ids.dtype, tuple(ids.shape)) == (torch.uint8, (6, 16))
    assert len({bytes(row.tolist()) for row in ids}) == 6
    assert torch.equal(sent(cache.encode(named, batch), "ids"), ids)
    assert not torch.equal(sent(other.encode(named, batch), "ids"), ids)


def test_each_view_of_a_sample_has_its_own_copy() -> None:
    cache = delta_cache()
    visit(cache, [0], numbers(1))
    delta = cache.encode(samples(0, view=0), numbers(1))
    assert "whole" in delta.tensors


def test_a_version_is_never_used_again() -> None:
    cache = delta_cache()
    first = cache.encode(samples(0), numbers(1))  # its response is lost
    second = cache.encode(samples(0), numbers(1))
    assert sent(first, "versions").tolist() == [[-1, 1]]
    assert sent(second, "versions").tolist() == [[-1, 2]]
    cache.confirm(second)
    lost = cache.encode(samples(0), numbers(1, seed=1))
    third = cache.encode(samples(0), numbers(1, seed=1))
    assert sent(lost, "versions").tolist() == [[2, 3]]
    assert sent(third, "versions").tolist() == [[2, 4]]
    cache.confirm(third)
    cache.forget(samples(0))
    assert sent(cache.encode(samples(0), numbers(1)), "versions").tolist() == [[-1, 5]]


def test_a_row_that_is_not_sent_keeps_its_version() -> None:
    cache = delta_cache(skip_below=0.5)
    visit(cache, [0, 1], numbers(2))
    moved = torch.stack([numbers(2)[0], -numbers(2)[1]])
    delta = cache.encode(samples(0, 1), moved)
    assert sent(delta, "versions").tolist() == [[1, 1], [1, 2]]


def test_copies_change_only_after_confirmation() -> None:
    cache = delta_cache()
    visit(cache, [0], numbers(1))
    cache.encode(samples(0, 1), numbers(2, seed=1))
    assert len(cache) == 1
    delta = cache.encode(samples(0), numbers(1, seed=2))
    assert torch.equal(sent(delta, "changes"), numbers(1, seed=2) - numbers(1))


def test_a_copy_does_not_share_memory_with_its_batch() -> None:
    cache = delta_cache()
    batch = numbers(1)
    visit(cache, [0], batch)
    batch.zero_()
    assert torch.equal(sent(cache.encode(samples(0), numbers(1)), "changes"), torch.zeros(1, 3, 64))


# Memory

ONE = TOKENS * WIDTH * 4  # bytes of a copy


def cached_positions(cache: DeltaCache, among: int) -> list[int]:
    delta = cache.encode(samples(*range(among)), numbers(among))
    rows = delta.tensors.get("whole_rows", (torch.empty(0), ""))[0].tolist()
    return sorted(set(range(among)) - set(rows))


def test_the_least_recently_used_copies_are_dropped() -> None:
    cache = delta_cache(skip_below=0.1, max_bytes=3 * ONE)
    visit(cache, [0, 1], numbers(2))
    visit(cache, [2], numbers(1))
    visit(cache, [0], numbers(2)[:1])  # not sent, but used
    visit(cache, [3], numbers(1))
    assert cached_positions(cache, 5) == [0, 2, 3]
    assert (len(cache), cache.nbytes) == (3, 3 * ONE)


def test_with_a_budget_below_one_copy_each_sample_is_sent_whole() -> None:
    cache = delta_cache(max_bytes=ONE - 1)
    for _ in range(2):
        delta = visit(cache, [0], numbers(1))
        assert "whole" in delta.tensors
    assert (len(cache), cache.nbytes) == (0, 0)


@given(
    visits=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True), max_size=12),
    copies=st.integers(0, 5),
    lost=st.sets(st.integers(0, 6)),
)
def test_nbytes_counts_the_copies_and_stays_within_the_budget(
    visits: list[list[int]], copies: int, lost: set[int]
) -> None:
    cache = delta_cache(max_bytes=copies * ONE)
    for number, positions in enumerate(visits):
        visit(cache, positions, numbers(len(positions), seed=number))
        assert cache.nbytes == len(cache) * ONE <= copies * ONE
        cache.forget(samples(*sorted(lost)))
        assert cache.nbytes == len(cache) * ONE
        assert not lost & set(cached_positions(cache, 7))


# Settings


def deltas_settings(method: dict[str, Any], **parts: dict[str, Any]) -> RunSettings:
    return RunSettings.model_validate({"method": {"name": "sfprompt-paper", **method}, **parts})


def test_settings_with_deltas_are_valid() -> None:
    deltas = {"delta_smashed": "int4+zstd", "skip_below": 0.05}
    settings = deltas_settings({**deltas, "gradient_correction": 0.01}, wire={"smashed": "int8"})
    assert settings.plan.method == deltas
    assert settings.plan.wire.gradient_correction == 0.01
    assert RunSettings.model_validate_json(settings.model_dump_json()).plan == settings.plan


@pytest.mark.parametrize(
    ("method", "wire", "message"),
    [
        ({"delta_smashed": "topk:0.1"}, {}, "not delta_smashed = topk:0.1"),
        ({"delta_smashed": "pq+zstd"}, {}, "not delta_smashed = pq\\+zstd"),
        ({"delta_smashed": "int4"}, {"smashed": "pq"}, "wire.smashed = pq"),
        ({"delta_smashed": "int4", "split_epochs": 0, "keep_fraction": 1}, {}, "delta_smashed"),
        ({"skip_below": 0.1}, {}, "skip_below needs delta_smashed"),
        ({"delta_smashed": "int4", "skip_below": 1.0}, {}, "skip_below"),
        ({"delta_smashed": "int4", "skip_below": -0.1}, {}, "skip_below"),
        ({"gradient_correction": -1.0}, {}, "gradient_correction"),
        ({"delta_smashed": "int64"}, {}, "delta_smashed"),
    ],
)
def test_settings_that_cannot_run_are_refused(
    method: dict[str, Any], wire: dict[str, Any], message: str
) -> None:
    given = {"local_learning_rate_scale": 1, **method}
    with pytest.raises(ValidationError, match=message):
        deltas_settings(given, wire=wire)


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ({"delta_smashed": "int4"}, "delta_smashed needs prompt_at = input"),
        ({"gradient_correction": 0.1}, "gradient_correction needs prompt_at = input"),
        ({"delta_smashed": "int4", "keep_smashed": True}, "delta_smashed"),
    ],
)
def test_deltas_need_prompts_at_the_input(wire: dict[str, Any], message: str) -> None:
    method = {"name": "custom", "model": {"prompt_at": "cut"}, "wire": wire}
    with pytest.raises(ValidationError, match=message):
        RunSettings.model_validate({"method": method})
