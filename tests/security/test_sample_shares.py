"""Attacks on the cache of smashed data, and what stops them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from split_server.storage.sample_store import Owner, SampleStore, StoreLimits
from tests.support.samples import TEN, lacking, put

HONEST = Owner("r1", "p0001")

GREEDY = [Owner("r1", f"p{number:04d}") for number in (2, 3, 4)]

SAMPLES = range(64)


@pytest.mark.parametrize(("memory", "disk"), [(4, 0), (1, 3)])  # in the samples of the honest one
@pytest.mark.parametrize("rounds", [1, 5])
def test_three_greedy_identities_push_out_none_of_another_participants_samples(
    tmp_path: Path, memory: int, disk: int, rounds: int
) -> None:
    """Tried: three identities send many times what the cache holds, while an honest device's
    samples wait unused. Stopped by: equal shares of memory and disk, which others cannot take."""
    size = TEN.nbytes * len(SAMPLES)
    store = SampleStore(tmp_path / "s", StoreLimits(memory * size, disk * size, 8 * size))
    with closing(store):
        put(store, HONEST, SAMPLES, TEN)
        for first in range(rounds):
            for greedy in GREEDY:
                put(store, greedy, range(1000 * first, 1000 * first + 256), TEN)
        assert lacking(store, HONEST, SAMPLES) == []
        assert store.memory_bytes <= memory * size
        assert store.disk_bytes <= disk * size


def test_a_participant_that_comes_when_the_cache_is_full_gets_its_share(tmp_path: Path) -> None:
    """Tried: three identities fill the whole cache before an honest device comes. Stopped by:
    whoever has more than an equal share gives way."""
    size = TEN.nbytes * len(SAMPLES)
    with closing(SampleStore(tmp_path / "s", StoreLimits(4 * size, 0, 8 * size))) as store:
        for greedy in GREEDY:
            put(store, greedy, range(200), TEN)
        for number in SAMPLES:
            put(store, HONEST, [number], TEN)
            for greedy in GREEDY:
                put(store, greedy, range(1000 + 2 * number, 1002 + 2 * number), TEN)
        assert lacking(store, HONEST, SAMPLES) == []
