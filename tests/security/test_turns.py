"""Attempts to take the engine from others by sending much or under many names, and what stops them.

The order of service is tested, not times: an address's share of the first samples served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch

from split_server.engine.scheduler import Batch, Schedule
from split_server.engine.tasks import ForwardTask, Kind
from split_server.models.body_key import BodyKey
from tests.support.federation import SPLIT

KIND = Kind(BodyKey(Path("backbone"), SPLIT), 5, 4, None, "graph")

SAMPLES, SERVED = 8, 200


def task(who: str, samples: int = SAMPLES) -> ForwardTask:
    return ForwardTask(
        kind=KIND, sender=("r", who), samples=samples, nbytes=1, fail=lambda _: None,
        smashed=torch.empty(samples, 5, 4), prompts=None, key=None, done=lambda _: None,
    )  # fmt: skip


def serve(backlog: Mapping[str, int], addresses: Mapping[str, str]) -> list[str]:
    """Return the senders of the first tasks served, one task a batch.

    Args:
        backlog: tasks that each sender always has queued: it sends one for each that is served.
        addresses: of the senders.
    """
    schedule = Schedule(5, 1, 0.0)
    for who, address in addresses.items():
        schedule.turns.locate(("r", who), address)
    now = 0.0
    for who, count in backlog.items():
        for _ in range(count):
            schedule.add_forward(task(who), now)
    served = []
    while len(served) < SERVED:
        now += 0.05
        batch = schedule.next(now, lambda _: set())
        assert isinstance(batch, Batch)
        for each in batch.tasks:
            served.append(each.sender[1])
            schedule.add_forward(task(each.sender[1]), now)
    return served


def test_one_greedy_participant_leaves_the_others_their_share() -> None:
    """Tried: one of four keeps fifty requests queued, the others one each. Stopped by: turns."""
    names = ["greedy", "a", "b", "c"]
    served = Counter(serve({"greedy": 50, "a": 1, "b": 1, "c": 1}, {n: n for n in names}))
    assert all(served[name] >= 0.8 * SERVED / 4 for name in ("a", "b", "c"))


def test_forty_identities_of_one_address_leave_other_addresses_their_share() -> None:
    """Tried: forty identities at one address, each at full speed. Stopped by: addresses share the
    engine equally, and only then the senders of an address."""
    sybils = {f"s{number}": "10.0.0.1" for number in range(40)}
    honest = {"a": "10.0.0.2", "b": "10.0.0.3"}
    backlog = dict.fromkeys(sybils, 2) | dict.fromkeys(honest, 1)
    order = serve(backlog, sybils | honest)
    served = Counter(order)
    assert all(served[name] >= 0.8 * SERVED / 3 for name in honest)
    waits = [at for at, name in enumerate(order) if name == "a"]
    assert max(after - before for before, after in pairwise(waits)) <= 6
    assert min(served[name] for name in sybils) >= 1, "each of them is still served"


def test_a_sender_behind_the_greedy_ones_own_address_gets_its_share_of_that_address() -> None:
    """Tried: the greedy one shares its address with an honest device. Stopped by: within an
    address senders take turns, too."""
    addresses = {"greedy": "10.0.0.1", "a": "10.0.0.1", "b": "10.0.0.2"}
    served = Counter(serve({"greedy": 50, "a": 1, "b": 1}, addresses))
    assert served["a"] >= 0.8 * SERVED / 4
    assert served["b"] >= 0.8 * SERVED / 2
