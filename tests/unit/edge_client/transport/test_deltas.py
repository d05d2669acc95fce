"""What a device sends of smashed data that change a little, and what it takes to be kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from edge_client.transport.deltas import DeltaBatch, DeltaCache
from protocol.codecs import get_codec
from protocol.codecs.registry import as_decoded
from protocol.errors import InvalidField
from protocol.plan import RunPlan

PLENTY = 10**9

TOKENS, WIDTH = 3, 64


def copies(
    whole: str = "float32", changes: str = "float32", skip_below: float = 0.0, limit: int = PLENTY
) -> DeltaCache:
    return DeltaCache(whole, changes, skip_below, limit)


def numbers(batch: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """[B, T, D]"""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((batch, TOKENS, WIDTH), generator=generator)


def samples(*positions: int, view: int | None = None) -> list[tuple[int, int | None]]:
    return [(position, view) for position in positions]


def sent(revision: DeltaBatch, name: str) -> Tensor:
    return revision.tensors[name][0]


def visit(held: DeltaCache, positions: list[int], smashed: Tensor) -> DeltaBatch:
    revision = held.revise(samples(*positions), smashed)
    held.confirm(revision)
    return revision


# What is sent


def test_a_sample_is_sent_whole_once_and_then_as_its_change() -> None:
    held = copies("float16", "int8")
    first, second = numbers(2), numbers(2, seed=1)
    revision = visit(held, [0, 1], first)
    assert set(revision.tensors) == {"ids", "versions", "whole", "whole_rows"}
    assert revision.tensors["whole"][1] == "float16"
    assert torch.equal(sent(revision, "whole"), first)
    assert sent(revision, "whole_rows").tolist() == [0, 1]
    assert torch.equal(revision.decoded, first.half().float())

    revision = visit(held, [0, 1], second)
    assert set(revision.tensors) == {"ids", "versions", "changes", "change_rows"}
    assert revision.tensors["changes"][1] == "int8"
    change = second - first.half().float()
    assert torch.equal(sent(revision, "changes"), change)
    scale = change.abs().amax(dim=-1, keepdim=True) / 127
    expected = first.half().float() + (change / scale).round() * scale
    assert torch.equal(revision.decoded, expected)


def test_a_batch_may_be_new_in_part() -> None:
    held = copies()
    visit(held, [4, 7], numbers(2))
    batch = numbers(4, seed=1)
    revision = visit(held, [5, 7, 6, 4], batch)
    assert sent(revision, "whole_rows").tolist() == [0, 2]
    assert sent(revision, "change_rows").tolist() == [1, 3]
    assert torch.equal(sent(revision, "whole"), batch[[0, 2]])
    assert torch.equal(sent(revision, "changes"), batch[[1, 3]] - numbers(2)[[1, 0]])
    assert torch.equal(revision.decoded[[0, 2]], batch[[0, 2]])


def test_a_small_change_is_not_sent() -> None:
    """Of length 5, moved by 0.3 and by 0.6: 6 % and 12 % of it (10 % is the border)."""
    held = copies(skip_below=0.1)
    start = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]]])
    visit(held, [0, 1], start)
    moved = torch.tensor([[[3.0, 4.3]], [[3.0, 4.6]]])
    revision = visit(held, [0, 1], moved)
    assert sent(revision, "change_rows").tolist() == [1]
    assert revision.decoded[0].tolist() == [[3.0, 4.0]]
    assert torch.allclose(revision.decoded[1], moved[1])
    # Small steps add up against what the server has, not against the last visit.
    revision = visit(held, [0], torch.tensor([[[3.0, 4.6]]]))
    assert sent(revision, "change_rows").tolist() == [0]


def test_nothing_but_names_is_sent_of_what_stands_still() -> None:
    held = copies(skip_below=1e-6)
    visit(held, [0, 1], numbers(2))
    revision = visit(held, [1, 0], numbers(2)[[1, 0]])
    assert set(revision.tensors) == {"ids", "versions"}
    assert torch.equal(revision.decoded, numbers(2)[[1, 0]])


def test_without_a_border_even_no_change_is_sent() -> None:
    held = copies()
    visit(held, [0], numbers(1))
    assert not sent(visit(held, [0], numbers(1)), "changes").any()


def test_numbers_that_a_codec_does_not_carry_change_nothing() -> None:
    held = copies("float32", "int4")
    visit(held, [0], numbers(1))
    with pytest.raises(InvalidField):
        held.revise(samples(0), numbers(1) * torch.inf)
    revision = held.revise(samples(0), numbers(1, seed=1))
    assert torch.equal(sent(revision, "changes"), numbers(1, seed=1) - numbers(1))


# Errors


@pytest.mark.parametrize("changes", ["int4", "int4-asym", "int8"])
def test_what_codecs_leave_out_does_not_add_up(changes: str) -> None:
    """Thirty visits with small changes, each coded with an error of its own."""
    held = copies("int4", changes)
    smashed = numbers(4)
    alone = float((as_decoded(smashed, changes) - smashed).norm())
    visit(held, [0, 1, 2, 3], smashed)
    errors = []
    for step in range(30):
        smashed = smashed + numbers(4, seed=step + 1, scale=0.02)
        revision = visit(held, [0, 1, 2, 3], smashed)
        errors.append(float((revision.decoded - smashed).norm()))
    assert max(errors[2:]) < 0.2 * alone
    assert max(errors[20:]) < 1.5 * max(errors[5:15])


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "pq", "topk:0.1", "int4+zstd"])
def test_as_decoded_is_what_comes_out_at_the_other_end(codec: str) -> None:
    tensor = numbers(2)
    one = get_codec(codec)
    arrived = [memoryview(bytes(buffer)) for buffer in one.encode(tensor)]
    there = one.decode(arrived, tensor.shape)
    here = as_decoded(tensor, codec)
    assert here.dtype == torch.float32
    assert torch.equal(here, there.float())


# Names and versions


def test_names_tell_samples_and_views_apart_but_not_which_they_are() -> None:
    held, other = copies(), copies()
    named = [*samples(0, 1, 2), *samples(0, 1, view=0), *samples(0, view=1)]
    batch = numbers(len(named))
    ids = sent(held.revise(named, batch), "ids")
    assert (ids.dtype, tuple(ids.shape)) == (torch.uint8, (6, 16))
    assert len({bytes(row.tolist()) for row in ids}) == 6
    assert torch.equal(sent(held.revise(named, batch), "ids"), ids)
    assert not torch.equal(sent(other.revise(named, batch), "ids"), ids)


def test_a_view_of_a_sample_is_a_sample_of_its_own() -> None:
    held = copies()
    visit(held, [0], numbers(1))
    revision = held.revise(samples(0, view=0), numbers(1))
    assert "whole" in revision.tensors


def test_a_version_is_never_used_again() -> None:
    held = copies()
    first = held.revise(samples(0), numbers(1))  # its answer is lost
    second = held.revise(samples(0), numbers(1))
    assert sent(first, "versions").tolist() == [[-1, 1]]
    assert sent(second, "versions").tolist() == [[-1, 2]]
    held.confirm(second)
    lost = held.revise(samples(0), numbers(1, seed=1))
    third = held.revise(samples(0), numbers(1, seed=1))
    assert sent(lost, "versions").tolist() == [[2, 3]]
    assert sent(third, "versions").tolist() == [[2, 4]]
    held.confirm(third)
    held.forget(samples(0))
    assert sent(held.revise(samples(0), numbers(1)), "versions").tolist() == [[-1, 5]]


def test_a_row_that_is_not_sent_keeps_its_version() -> None:
    held = copies(skip_below=0.5)
    visit(held, [0, 1], numbers(2))
    moved = torch.stack([numbers(2)[0], -numbers(2)[1]])
    revision = held.revise(samples(0, 1), moved)
    assert sent(revision, "versions").tolist() == [[1, 1], [1, 2]]


def test_nothing_changes_before_the_server_has_said_so() -> None:
    held = copies()
    visit(held, [0], numbers(1))
    held.revise(samples(0, 1), numbers(2, seed=1))
    assert len(held) == 1
    revision = held.revise(samples(0), numbers(1, seed=2))
    assert torch.equal(sent(revision, "changes"), numbers(1, seed=2) - numbers(1))


def test_a_copy_does_not_share_the_batch_it_was_made_of() -> None:
    held = copies()
    batch = numbers(1)
    visit(held, [0], batch)
    batch.zero_()
    assert torch.equal(sent(held.revise(samples(0), numbers(1)), "changes"), torch.zeros(1, 3, 64))


# Memory

ONE = TOKENS * WIDTH * 4  # bytes of a copy


def known(held: DeltaCache, among: int) -> list[int]:
    revision = held.revise(samples(*range(among)), numbers(among))
    rows = revision.tensors.get("whole_rows", (torch.empty(0), ""))[0].tolist()
    return sorted(set(range(among)) - set(rows))


def test_the_longest_unused_are_forgotten() -> None:
    held = copies(skip_below=0.1, limit=3 * ONE)
    visit(held, [0, 1], numbers(2))
    visit(held, [2], numbers(1))
    visit(held, [0], numbers(2)[:1])  # not sent, but used
    visit(held, [3], numbers(1))
    assert known(held, 5) == [0, 2, 3]
    assert (len(held), held.nbytes) == (3, 3 * ONE)


def test_without_room_for_one_every_sample_is_sent_whole() -> None:
    held = copies(limit=ONE - 1)
    for _ in range(2):
        revision = visit(held, [0], numbers(1))
        assert "whole" in revision.tensors
    assert (len(held), held.nbytes) == (0, 0)


@given(
    visits=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True), max_size=12),
    room=st.integers(0, 5),
    lost=st.sets(st.integers(0, 6)),
)
def test_the_bytes_are_those_of_the_copies_and_within_the_limit(
    visits: list[list[int]], room: int, lost: set[int]
) -> None:
    held = copies(limit=room * ONE)
    for number, positions in enumerate(visits):
        visit(held, positions, numbers(len(positions), seed=number))
        assert held.nbytes == len(held) * ONE <= room * ONE
        held.forget(samples(*sorted(lost)))
        assert held.nbytes == len(held) * ONE
        assert not lost & set(known(held, 7))


# Settings


def test_a_run_may_send_changes() -> None:
    wire = {"smashed": "int8", "delta_smashed": "int4+zstd", "skip_below": 0.05}
    settings = RunPlan.model_validate({"wire": {**wire, "gradient_correction": 0.01}})
    assert RunPlan.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("wire", "model", "said"),
    [
        ({"delta_smashed": "int4"}, {"prompt_at": "cut"}, "prompt_at = input"),
        ({"gradient_correction": 0.1}, {"prompt_at": "cut"}, "prompt_at = input"),
        ({"delta_smashed": "topk:0.1"}, {}, "wire.delta_smashed = topk:0.1"),
        ({"delta_smashed": "pq+zstd"}, {}, "wire.delta_smashed = pq\\+zstd"),
        ({"delta_smashed": "int4", "smashed": "pq"}, {}, "wire.smashed = pq"),
        ({"delta_smashed": "int4", "keep_smashed": True}, {}, "keep_smashed"),
        ({"delta_smashed": "int4", "keep_smashed": True}, {"prompt_at": "cut"}, "delta_smashed"),
        ({"skip_below": 0.1}, {}, "needs wire.delta_smashed"),
        ({"delta_smashed": "int4", "skip_below": 1.0}, {}, "skip_below"),
        ({"delta_smashed": "int4", "skip_below": -0.1}, {}, "skip_below"),
        ({"gradient_correction": -1.0}, {}, "gradient_correction"),
        ({"delta_smashed": "int64"}, {}, "delta_smashed"),
    ],
)
def test_a_run_that_cannot_work_is_refused(
    wire: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        RunPlan.model_validate({"wire": wire, "model": model})
