"""The memory of steps between forward and backward: who may have how much."""

from __future__ import annotations

import torch

from protocol.errors import TooLarge
from split_model import anatomy
from split_server.engine.bodies import BodyKey
from split_server.engine.compute import StepSizes
from split_server.engine.jobs import Backward
from split_server.engine.steps import RetainedSteps, StepKey
from split_server.engine.tasks import Keep


class StepRoom:
    """Decides what is kept of a step. Not thread-safe: the engine holds its lock.

    Args:
        limit: bytes for all that is retained.
        backward: see `EngineLimits`.
        dtype: of the bodies.
    """

    def __init__(self, limit: int, backward: Backward, steps: int, dtype: torch.dtype) -> None:
        self._limit = limit
        self._backward = backward
        self._itemsize = dtype.itemsize
        self.steps = RetainedSteps(steps)
        self.sizes = StepSizes()
        self.reserved = 0  # for forwards that wait
        self.others = 0  # sessions

    @property
    def taken(self) -> int:
        """Bytes that are held or promised."""
        return self.steps.nbytes + self.reserved + self.others

    def fits(self, need: int) -> bool:
        """Whether there is room; whoever needs no more than it gives back always has it."""
        return need <= 0 or self.taken + need <= self._limit

    def ask(
        self, body: BodyKey, smashed: torch.Tensor, instead_of: StepKey | None = None
    ) -> tuple[Keep, int] | None:
        """What may be kept of a forward of ``smashed`` [B, T, D], and its bytes; None: nothing now.

        Args:
            body: that it runs through.
            smashed: its input.
            instead_of: a step that makes room for it.

        Raises:
            TooLarge: it never fits.
        """
        freed = 0 if instead_of is None else self.steps.room_of(instead_of)
        if self._backward != "recompute":
            whole = self._graph_bytes(body, smashed)
            need = max(0, whole - freed)
            if whole <= self._limit and self.fits(need):
                return "graph", need
            if self._backward == "retained":
                self._require_ever(whole)
                return None
        whole = smashed.numel() * self._itemsize
        self._require_ever(whole)
        need = max(0, whole - freed)
        return ("input", need) if self.fits(need) else None

    def _graph_bytes(self, body: BodyKey, smashed: torch.Tensor) -> int:
        depth = anatomy(body.settings).depth
        blocks = depth - body.settings.cut - body.settings.tail_blocks
        need = self.sizes.estimate(body, blocks, smashed, self._itemsize)
        known = self.sizes.is_known(body, smashed)
        return need if known else min(need, self._limit)  # a guess may be too high

    def _require_ever(self, need: int) -> None:
        if need > self._limit:
            raise TooLarge(
                "a batch of this size does not fit the memory that steps may take",
                field="smashed",
                limit=self._limit,
                value=need,
                hint="use a smaller batch_size, or raise engine_memory_mib",
            )
