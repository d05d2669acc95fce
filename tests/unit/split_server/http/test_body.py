"""The body buffer and the memory budget of requests."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Busy
from split_server.http.body import BufferHolder
from split_server.http.budget import BodyBudget
from tests.support.federation import busy_error


def holder() -> BufferHolder:
    return BufferHolder(lambda _: None)


@given(st.lists(st.binary(max_size=50), max_size=8), st.binary(max_size=20))
def test_pieces_are_joined_into_one_body(pieces: list[bytes], begun: bytes) -> None:
    whole = begun + b"".join(pieces)

    async def take() -> bytes:
        buffer = holder().open(len(whole), begun, None)
        for piece in pieces:
            if buffer.is_open:
                buffer.write(piece)
        return bytes(await buffer.complete)

    assert asyncio.run(take()) == whole


def test_the_budget_counts_received_bytes_not_the_declared_length() -> None:
    budget = BodyBudget(1000, busy_error)

    async def take() -> None:
        with budget.reserve() as reservation, budget.reserve() as other:
            other.add(500)
            buffer = holder().open(10**9, b"x" * 100, reservation)
            assert budget.taken == 600
            buffer.write(b"x" * 400)
            assert budget.taken == 1000
            buffer.write(b"x")
            assert not buffer.is_open
            with pytest.raises(Busy):
                await buffer.complete

    asyncio.run(take())
    assert budget.taken == 0


def test_a_disconnect_ends_the_wait_for_the_body() -> None:
    async def gone() -> None:
        place = holder()
        buffer = place.open(10, b"abc", None)
        assert place.open_buffer is buffer
        buffer.disconnect()
        assert place.open_buffer is None
        with pytest.raises(ConnectionError):
            await buffer.complete

    asyncio.run(gone())


def test_reading_resumes_when_a_buffer_opens() -> None:
    left: list[int] = []

    async def begin() -> None:
        BufferHolder(lambda buffer: left.append(buffer.rest.nbytes)).open(10, b"abc", None)

    asyncio.run(begin())
    assert left == [7]


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_refused_chunk_counts_as_received(refused: int) -> None:
    budget = BodyBudget(1000, busy_error)

    async def take() -> int:
        with budget.reserve() as other, budget.reserve() as reservation:
            other.add(1000 - 100 * refused)
            buffer = holder().open(10_000, b"x" * 100, reservation)
            for _ in range(refused):
                assert buffer.is_open
                buffer.write(b"x" * 100)
            with pytest.raises(Busy):
                await buffer.complete
            return buffer.rest.nbytes

    assert asyncio.run(take()) == 10_000 - 100 * (refused + 1)
