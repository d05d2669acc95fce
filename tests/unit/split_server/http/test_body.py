"""A body on its way from the parser into its buffer."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Busy
from split_server.http.body import BodyBudget, SinkHolder
from tests.support.federation import busy_error


def holder() -> SinkHolder:
    return SinkHolder(lambda _: None)


@given(st.lists(st.binary(max_size=50), max_size=8), st.binary(max_size=20))
def test_what_comes_in_pieces_is_one_body(pieces: list[bytes], begun: bytes) -> None:
    whole = begun + b"".join(pieces)

    async def take() -> bytes:
        sink = holder().open(len(whole), begun, None)
        for piece in pieces:
            if sink.is_open:
                sink.write(piece)
        return bytes(await sink.complete)

    assert asyncio.run(take()) == whole


def test_room_is_taken_for_what_has_come_and_not_for_what_was_announced() -> None:
    room = BodyBudget(1000, busy_error)

    async def take() -> None:
        with room.claim() as claim, room.claim() as other:
            other.add(500)
            sink = holder().open(10**9, b"x" * 100, claim)
            assert room.taken == 600
            sink.write(b"x" * 400)
            assert room.taken == 1000
            sink.write(b"x")
            assert not sink.is_open
            with pytest.raises(Busy):
                await sink.complete

    asyncio.run(take())
    assert room.taken == 0


def test_whoever_goes_away_leaves_no_one_waiting() -> None:
    async def gone() -> None:
        place = holder()
        sink = place.open(10, b"abc", None)
        assert place.open_sink is sink
        sink.disconnect()
        assert place.open_sink is None
        with pytest.raises(ConnectionError):
            await sink.complete

    asyncio.run(gone())


def test_reading_goes_on_once_there_is_a_sink() -> None:
    left: list[int] = []

    async def begin() -> None:
        SinkHolder(lambda sink: left.append(sink.rest.nbytes)).open(10, b"abc", None)

    asyncio.run(begin())
    assert left == [7]


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_what_is_refused_has_come_and_is_not_waited_for(refused: int) -> None:
    room = BodyBudget(1000, busy_error)

    async def take() -> int:
        with room.claim() as other, room.claim() as claim:
            other.add(1000 - 100 * refused)
            sink = holder().open(10_000, b"x" * 100, claim)
            for _ in range(refused):
                assert sink.is_open
                sink.write(b"x" * 100)
            with pytest.raises(Busy):
                await sink.complete
            return sink.rest.nbytes

    assert asyncio.run(take()) == 10_000 - 100 * (refused + 1)
