"""The memory of steps between forward and backward: who may have how much."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.errors import TooLarge
from split_model import body_blocks
from split_server.engine.api import StepKey
from split_server.engine.limits import BackwardMode
from split_server.engine.steps import RetainedSteps
from split_server.engine.tasks import Keep
from split_server.models.body_key import BodyKey

_BUFFERS_PER_BLOCK = 20  # [B, T, D] tensors that a block saves; a first guess, then measured


class StepSizes:
    """How many bytes a forward keeps: guessed once for each kind of step, then known."""

    def __init__(self) -> None:
        self._per_sample: dict[tuple[object, int], int] = {}
        self._batch: dict[tuple[object, int], int] = {}  # the largest that was measured

    def estimate(self, kind: object, blocks: int, smashed: Tensor, itemsize: int) -> int:
        """Bytes that a forward of ``smashed`` [B, T, D] will keep."""
        batch, tokens, width = smashed.shape
        guess = (blocks * _BUFFERS_PER_BLOCK + 2) * tokens * width * itemsize
        return int(batch) * self._per_sample.get((kind, int(tokens)), guess)

    def is_known(self, kind: object, smashed: Tensor) -> bool:
        return (kind, int(smashed.shape[1])) in self._per_sample

    def measured(self, kind: object, smashed: Tensor) -> int | None:
        """Bytes that a forward of ``smashed`` [B, T, D] keeps; None: none so large was measured.

        What is kept once a batch, whatever its size, weighs the more in a small one.
        """
        batch, tokens, _ = smashed.shape
        key = kind, int(tokens)
        return int(batch) * self._per_sample[key] if batch <= self._batch.get(key, 0) else None

    def learn(self, kind: object, smashed: Tensor, nbytes: int) -> None:
        batch, tokens, _ = smashed.shape
        self._per_sample[kind, int(tokens)] = -(-nbytes // max(1, int(batch)))
        self._batch[kind, int(tokens)] = int(batch)


class MemoryBudget:
    """Decides what is kept of a step. Not thread-safe: the engine holds its lock.

    Args:
        limit: bytes for all that is retained.
        backward: see `EngineLimits`.
        dtype: of the bodies.
    """

    def __init__(self, limit: int, backward: BackwardMode, steps: int, dtype: torch.dtype) -> None:
        self._limit = limit
        self._backward = backward
        self._itemsize = dtype.itemsize
        self.steps = RetainedSteps(steps)
        self.sizes = StepSizes()
        self.reserved = 0  # for forwards that wait
        self.others = 0  # sessions
        self.bodies = 0  # that participants have of their own, each with its open step

    @property
    def taken(self) -> int:
        """Bytes that are held or promised."""
        return self.steps.nbytes + self.reserved + self.others + self.bodies

    def fits(self, need: int) -> bool:
        """Whether there is room; whoever needs no more than it gives back always has it."""
        return need <= 0 or self.taken + need <= self._limit

    def ask(
        self,
        body: BodyKey,
        smashed: torch.Tensor,
        num_tokens: int | None,
        instead_of: StepKey | None = None,
    ) -> tuple[Keep, int] | None:
        """What may be kept of a forward of ``smashed`` [B, T, D], and its bytes; None: nothing now.

        Its answer is among them, which is kept for repeats.

        Args:
            body: that it runs through.
            smashed: its input.
            leading: of the features' tokens, those that are wanted; None: all.
            instead_of: a step that makes room for it.

        Raises:
            TooLarge: it never fits.
        """
        freed = 0 if instead_of is None else self.steps.room_of(instead_of)
        answer = self._answer_bytes(body, smashed, num_tokens)
        if self._backward != "recompute":
            whole = self._graph_bytes(body, smashed, num_tokens, answer)
            need = max(0, whole - freed)
            if whole <= self._limit and self.fits(need):
                return "graph", need
            if self._backward == "retained":
                self._require_ever(whole)
                return None
        whole = smashed.numel() * self._itemsize + answer
        self._require_ever(whole)
        need = max(0, whole - freed)
        return ("input", need) if self.fits(need) else None

    def ask_for_body(
        self, body: BodyKey, largest: torch.Tensor, weights: int
    ) -> tuple[Keep, int] | None:
        """What may be kept of each step of a body of one's own, and the bytes of it all.

        Args:
            body: which.
            largest: a batch [B, T, D] that is as large as any.
            weights: bytes of the body, its gradients and its optimiser, all in float32.

        Returns:
            None: there is no room now.

        Raises:
            TooLarge: it never fits.
        """
        found: list[tuple[Keep, int]] = []
        one = largest.numel() * torch.float32.itemsize
        weights += 2 * one  # the newest answer of either way, which is kept for repeats
        least = weights + one
        if self._backward != "recompute":
            size = self.sizes.estimate(
                body.unstated, _blocks(body), largest, torch.float32.itemsize
            )
            if not self.sizes.is_known(body.unstated, largest):
                size = min(size, self._limit - weights)  # a guess may be too high
            found.append(("graph", max(least, weights + size)))
        if self._backward != "retained":
            found.append(("input", least))
        for keep, need in found:
            if need <= self._limit and self.fits(need):
                return keep, need
        least = min(need for _, need in found)
        if least > self._limit:
            raise TooLarge(
                "a body of one's own, its optimiser and a step do not fit the engine's memory",
                field="tune_body",
                limit=self._limit,
                value=least,
                hint="raise engine_memory_mib",
            )
        return None

    def _graph_bytes(
        self, body: BodyKey, smashed: torch.Tensor, num_tokens: int | None, answer: int
    ) -> int:
        kind = body, num_tokens
        need = self.sizes.estimate(kind, _blocks(body), smashed, self._itemsize) + answer
        known = self.sizes.is_known(kind, smashed)
        return need if known else min(need, self._limit)  # a guess may be too high

    def _answer_bytes(self, body: BodyKey, smashed: torch.Tensor, num_tokens: int | None) -> int:
        batch, tokens, width = smashed.shape
        joined = body.settings.prompt_count if body.settings.prompt_at == "cut" else 0
        wanted = int(tokens) + joined if num_tokens is None else num_tokens
        return int(batch) * wanted * int(width) * self._itemsize

    def _require_ever(self, need: int) -> None:
        if need > self._limit:
            raise TooLarge(
                "a batch of this size does not fit the memory that steps may take",
                field="smashed",
                limit=self._limit,
                value=need,
                hint="use a smaller batch_size, or raise engine_memory_mib",
            )


def _blocks(body: BodyKey) -> int:
    return len(body_blocks(body.settings))
