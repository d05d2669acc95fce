"""Whose turn it is: shares of the engine for addresses, and for the senders of each."""

from __future__ import annotations

from collections import OrderedDict

from split_server.engine.tasks import Sender, Task

_ACTIVE_S = 10.0  # a sender that was seen within this time counts at its address

_MAX_SENDERS = 10_000


class Turns:
    """Start-time fair queuing of senders, weighted so that addresses have equal shares.

    A sender's turn moves on by the samples that it has had, times the number of active senders of
    its address: many identities of one address together advance as fast as one sender elsewhere. A
    sender without an address is alone. Not thread-safe.

    Source: Goyal, Vin, Cheng, Start-time fair queuing (1996).
    """

    def __init__(self) -> None:
        self._now = 0.0  # the turn of the last task that was taken
        self._next: dict[Sender, float] = {}
        self._addresses: OrderedDict[Sender, str] = OrderedDict()  # the last ones seen
        self._active: dict[object, dict[Sender, float]] = {}  # by address; when last seen

    def locate(self, sender: Sender, address: str) -> None:
        """Remember the address of a sender's requests."""
        self._addresses[sender] = address
        self._addresses.move_to_end(sender)
        while len(self._addresses) > _MAX_SENDERS:
            self._addresses.popitem(last=False)

    def address_of(self, sender: Sender) -> object:
        """Return the address of a sender; its own name if none is known."""
        return self._addresses.get(sender, sender)

    def give(self, task: Task, now: float) -> float:
        """Return a new task's turn; tasks run in the order of their turns.

        Args:
            task: the task.
            now: seconds on the monotonic clock.
        """
        address = self.address_of(task.sender)
        seen = self._active.setdefault(address, {})
        is_new = task.sender not in seen
        seen[task.sender] = now
        if len(seen) > 1:
            seen = {each: at for each, at in seen.items() if at + _ACTIVE_S > now}
            self._active[address] = seen
        turn = max(self._now, self._next.get(task.sender, 0.0))
        if is_new:  # behind the first turns of the others of its address
            turn = max(turn, self._now + task.samples * (len(seen) - 1))
        self._next[task.sender] = turn + task.samples * len(seen)
        return turn

    def take(self, turn: float) -> None:
        """Note that a task with this turn runs; forget idle senders once there are many."""
        self._now = max(self._now, turn)
        if len(self._next) > _MAX_SENDERS:
            self._next = {sender: at for sender, at in self._next.items() if at > self._now}
        if len(self._active) > _MAX_SENDERS:
            self._active.clear()
