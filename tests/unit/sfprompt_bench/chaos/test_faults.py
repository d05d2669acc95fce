"""Faults are drawn from a seed, within the requests that a run has."""

from __future__ import annotations

from collections import Counter

import pytest

from sfprompt_bench.chaos.faults import DISK, HEAVY, NETWORK, Kind, draw_faults

REQUESTS = {"update": 4, "exchange": 20, "participants": 2}


def test_a_seed_fixes_the_faults() -> None:
    first, again = (draw_faults(7, REQUESTS, 18, with_disk=True) for _ in range(2))
    assert first == again
    assert first != draw_faults(8, REQUESTS, 18, with_disk=True)


def test_faults_happen_at_requests_that_the_run_has() -> None:
    for seed in range(50):
        for fault in draw_faults(seed, REQUESTS, 18, with_disk=True):
            assert 1 <= fault.number <= REQUESTS[fault.route]


def test_every_kind_is_drawn_and_most_faults_are_of_the_network() -> None:
    drawn = [f for seed in range(200) for f in draw_faults(seed, REQUESTS, 18, with_disk=True)]
    kinds = Counter(fault.kind for fault in drawn)
    assert set(kinds) == set(Kind) == {*NETWORK, *HEAVY, *DISK}
    assert sum(kinds[kind] for kind in NETWORK) > len(drawn) / 2


@pytest.mark.parametrize("seed", range(20))
def test_without_small_disks_no_disk_is_filled(seed: int) -> None:
    kinds = {fault.kind for fault in draw_faults(seed, REQUESTS, 18, with_disk=False)}
    assert not kinds & {Kind.FULL_DISK_SERVER, Kind.FULL_DISK_DEVICE}
