"""The memory budget of steps between forward and backward, and of sessions."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.errors import TooLarge
from split_model.backbone.architecture import body_blocks
from split_server.engine.api import StepKey
from split_server.engine.limits import BackwardMode
from split_server.engine.steps import RetainedSteps
from split_server.engine.tasks import Retention
from split_server.models.body_key import BodyKey

_BUFFERS_PER_BLOCK = 20  # [B, T, D] tensors that a block saves: the estimate before a measurement


class StepSizes:
    """Bytes that a forward's graph saves: estimated for each kind of step, then measured."""

    def __init__(self) -> None:
        self._per_sample: dict[tuple[object, int], int] = {}
        self._batch: dict[tuple[object, int], int] = {}  # samples of the last measured batch

    def estimate(self, kind: object, body: BodyKey, smashed: Tensor, itemsize: int) -> int:
        """Estimate the bytes that a forward of ``smashed`` [B, T, D] will save."""
        batch, tokens, width = smashed.shape
        buffers = len(body_blocks(body.settings)) * _BUFFERS_PER_BLOCK + 2
        guess = buffers * tokens * width * itemsize
        return int(batch) * self._per_sample.get((kind, int(tokens)), guess)

    def is_known(self, kind: object, smashed: Tensor) -> bool:
        """Whether a forward of this kind has been measured."""
        return (kind, int(smashed.shape[1])) in self._per_sample

    def get_measured(self, kind: object, smashed: Tensor) -> int | None:
        """Return the bytes that a forward of ``smashed`` [B, T, D] saves.

        None if the measured batch was smaller: bytes saved once per batch, whatever its size,
        weigh more in a small batch.
        """
        batch, tokens, _ = smashed.shape
        key = kind, int(tokens)
        return int(batch) * self._per_sample[key] if batch <= self._batch.get(key, 0) else None

    def learn(self, kind: object, smashed: Tensor, nbytes: int) -> None:
        """Store a measurement: a forward of ``smashed`` [B, T, D] has saved ``nbytes``."""
        batch, tokens, _ = smashed.shape
        self._per_sample[kind, int(tokens)] = -(-nbytes // max(1, int(batch)))
        self._batch[kind, int(tokens)] = int(batch)


class MemoryBudget:
    """Decides what steps retain. Not thread-safe: callers hold the engine's lock.

    Args:
        limit: bytes for everything retained.
        backward: see `EngineLimits`.
        steps: open steps of one participant.
        dtype: of the bodies' input and output.

    Attributes:
        reserved: bytes for forwards in the queue.
        session_bytes: bytes of all sessions, by their handler's class.
    """

    def __init__(self, limit: int, backward: BackwardMode, steps: int, dtype: torch.dtype) -> None:
        self.limit = limit
        self.backward = backward
        self._itemsize = dtype.itemsize
        self.steps = RetainedSteps(steps)
        self.sizes = StepSizes()
        self.reserved = 0
        self.session_bytes: dict[type, int] = {}

    @property
    def taken(self) -> int:
        """Bytes in use or reserved."""
        return self.steps.nbytes + self.reserved + sum(self.session_bytes.values())

    def fits(self, need: int) -> bool:
        """Whether ``need`` more bytes fit. A step that frees what it needs always fits."""
        return need <= 0 or self.taken + need <= self.limit

    def choose_retention(
        self,
        body: BodyKey,
        smashed: Tensor,
        num_tokens: int | None,
        replaces: StepKey | None = None,
    ) -> tuple[Retention, int] | None:
        """Choose what a step retains of its forward.

        Args:
            body: the forward's body.
            smashed: the forward's input [B, T, D].
            num_tokens: number of the features' tokens to return; None: all.
            replaces: a step that will be dropped for this one.

        Returns:
            The retention and the additional bytes for it, the response for repeated requests
            included; None if they do not fit now.

        Raises:
            TooLarge: the step exceeds the whole budget.
        """
        freed = 0 if replaces is None else self.steps.bytes_freed_by(replaces)
        response = self._response_bytes(body, smashed, num_tokens)
        if self.backward != "recompute":
            total = self._graph_bytes(body, smashed, num_tokens) + response
            if not self.sizes.is_known((body, num_tokens), smashed):
                total = min(total, self.limit)  # an estimate may be too high
            need = max(0, total - freed)
            if total <= self.limit and self.fits(need):
                return "graph", need
            if self.backward == "retained":
                self._check_limit(total)
                return None
        total = smashed.numel() * self._itemsize + response
        self._check_limit(total)
        need = max(0, total - freed)
        return ("input", need) if self.fits(need) else None

    def _graph_bytes(self, body: BodyKey, smashed: Tensor, num_tokens: int | None) -> int:
        return self.sizes.estimate((body, num_tokens), body, smashed, self._itemsize)

    def _response_bytes(self, body: BodyKey, smashed: Tensor, num_tokens: int | None) -> int:
        batch, tokens, width = smashed.shape
        prompts = body.settings.prompt_count if body.settings.prompt_at == "cut" else 0
        returned = int(tokens) + prompts if num_tokens is None else num_tokens
        return int(batch) * returned * int(width) * self._itemsize

    def _check_limit(self, need: int) -> None:
        if need > self.limit:
            raise TooLarge(
                "a batch of this size exceeds the memory for open steps",
                field="smashed",
                limit=self.limit,
                value=need,
                hint="use a smaller batch_size, or raise engine_memory_mib",
            )
