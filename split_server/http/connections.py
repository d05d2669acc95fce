"""Which connections stay open: limits of each sender, room for known ones, idle ones closed."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from split_server.federation.credentials import Identity, Operator, ParticipantIdentity

_KNOWN_SHARE = 4  # one in so many connections is kept for known senders

_GRACE_S = 1.0  # for a new connection's request to be read, before the connection may give way

_SWEEP_S = 1.0

_IPV6_BITS = 64  # of an address that name a network: its owner has all addresses in it

Owner = tuple[str, str]  # run and participant, or "address" and a network's address

OPERATOR: Owner = ("operator", "")


class Closable(Protocol):
    """A connection that can be closed at once."""

    def give_up(self) -> None:
        """Close it, without waiting for its client."""


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of open connections.

    Attributes:
        total: of all senders.
        per_address: of one address, of those that have named no participant and no operator.
        per_participant: of one participant.
        first_request_s: until the first request of a connection is complete.
        idle_s: until a later one is.
    """

    total: int
    per_address: int
    per_participant: int
    first_request_s: float
    idle_s: float


class _Wait(NamedTuple):
    """The wait for a request; seconds of the clock."""

    since: float
    until: float


@dataclass
class _Group:
    """The connections of one owner."""

    limit: float
    is_known: bool
    members: set[Closable] = field(default_factory=set)
    waiting: OrderedDict[Closable, _Wait] = field(default_factory=OrderedDict)


class ConnectionTable:
    """All open connections. Used on the event loop only.

    A connection is *known* once a request of it has carried a valid credential. It *waits* while
    the server has no complete request of it; a known one only before a request's head is complete.
    Who needs room takes it from the connection that has waited longest: of the same owner at the
    owner's limit, else of the owner with the most connections, and of unknown owners first. A
    sender that opens many connections so closes its own. If none waits, the new one is refused.

    Args:
        limits: of connections.
        clock: seconds that never go back.
    """

    def __init__(
        self, limits: ConnectionLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._clock = limits, clock
        self._owners: dict[Closable, Owner] = {}
        self._groups: dict[Owner, _Group] = {}
        self._unknown = 0

    def __len__(self) -> int:
        """Count open connections."""
        return len(self._owners)

    @property
    def unknown(self) -> int:
        """Connections that have named neither a participant nor the operator."""
        return self._unknown

    def connect(self, connection: Closable, address: str) -> bool:
        """Count a new connection; returns whether there is room for it."""
        owner = ("address", _network_of(address))
        if not self._has_room(owner):
            return False
        self._join(connection, owner)
        return True

    def identify(self, connection: Closable, identity: Identity) -> bool:
        """Note who has sent a request; returns whether this sender may have one more connection."""
        owner = _owner_of(identity)
        if owner is None or connection not in self._owners:
            return True
        if self._owners[connection] != owner:
            self.disconnect(connection)
            self._join(connection, owner)
            group = self._groups[owner]
            group.waiting.pop(connection)
            if len(group.members) > group.limit and not self._evict(group):
                return False
        self.begin(connection)
        return True

    def begin(self, connection: Closable) -> None:
        """Note that a request is complete: the connection waits no more."""
        if (owner := self._owners.get(connection)) is not None:
            self._groups[owner].waiting.pop(connection, None)

    def wait(self, connection: Closable) -> None:
        """Note that a response is complete: the connection waits for the next request."""
        if (owner := self._owners.get(connection)) is not None:
            now, waiting = self._clock(), self._groups[owner].waiting
            waiting[connection] = _Wait(now, now + self._limits.idle_s)
            waiting.move_to_end(connection)

    def disconnect(self, connection: Closable) -> None:
        """Count a connection no more."""
        owner = self._owners.pop(connection, None)
        if owner is None:
            return
        group = self._groups[owner]
        group.members.discard(connection)
        group.waiting.pop(connection, None)
        self._unknown -= not group.is_known
        if not group.members:
            del self._groups[owner]

    def sweep(self) -> None:
        """Close the connections that have waited too long, or that are too many."""
        now = self._clock()
        for group in list(self._groups.values()):
            for connection, wait in list(group.waiting.items()):
                excess = len(group.members) > group.limit and now - wait.since >= _GRACE_S
                if excess or now >= wait.until:
                    self._close(connection)

    async def watch(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep()

    def _has_room(self, owner: Owner) -> bool:
        """Make room for one more unknown connection; returns whether there is."""
        group = self._groups.get(owner)
        if group is not None and len(group.members) >= group.limit:
            if not group.waiting:
                return False
            if self._clock() - next(iter(group.waiting.values())).since >= _GRACE_S:
                self._evict(group)
        total = self._limits.total
        if self._unknown >= max(1, total - total // _KNOWN_SHARE):
            return self._evict_from_largest(is_known=False)
        if len(self) >= total:
            return any(self._evict_from_largest(is_known=known) for known in (False, True))
        return True

    def _evict_from_largest(self, *, is_known: bool) -> bool:
        groups = [g for g in self._groups.values() if g.waiting and g.is_known == is_known]
        return self._evict(max(groups, key=lambda group: len(group.members))) if groups else False

    def _evict(self, group: _Group) -> bool:
        """Close the connection of a group that has waited longest; returns whether one waits."""
        if not group.waiting:
            return False
        self._close(next(iter(group.waiting)))
        return True

    def _close(self, connection: Closable) -> None:
        self.disconnect(connection)
        connection.give_up()

    def _join(self, connection: Closable, owner: Owner) -> None:
        group = self._groups.get(owner)
        if group is None:
            group = self._groups[owner] = self._new_group(owner)
        self._owners[connection] = owner
        group.members.add(connection)
        now = self._clock()
        group.waiting[connection] = _Wait(now, now + self._limits.first_request_s)
        self._unknown += not group.is_known

    def _new_group(self, owner: Owner) -> _Group:
        if owner[0] == "address":
            return _Group(self._limits.per_address, is_known=False)
        limit = float("inf") if owner == OPERATOR else self._limits.per_participant
        return _Group(limit, is_known=True)


def _owner_of(identity: Identity) -> Owner | None:
    if isinstance(identity, ParticipantIdentity):
        return identity.run, identity.participant
    return OPERATOR if isinstance(identity, Operator) else None


def _network_of(address: str) -> str:
    """Return an IPv4 address, or the network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a Unix socket
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), _IPV6_BITS), strict=False))
    return str(parsed)
