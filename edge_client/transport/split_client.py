"""The split plane as the device sees it: tensors up, tensors down, in the run's codecs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edge_client.transport.client import Server
from edge_client.transport.deltas import DeltaBatch, DeltaCache
from protocol.errors import Busy, MalformedFrame, SFPromptError
from protocol.frames import Frame, require_kind
from protocol.limits import DEFAULT_LIMITS, MIB
from protocol.messages import SAMPLE_ID_BYTES, BodyStepMeta, ExchangeMeta
from protocol.plan import RunPlan
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
)
from split_model import Head, anatomy, needed_tokens

_IDS_AT_ONCE = 16_384

Payload = Mapping[str, tuple[Tensor, str]]


class SamplesMissing(SFPromptError):
    """The server does not keep some of the samples that a request names; nothing has changed.

    Attributes:
        places: of these samples, among those named.
    """

    def __init__(self, places: list[int]) -> None:
        super().__init__(
            "the server lacks samples that this device has sent",
            field="ids",
            limit=0,
            value=len(places),
            hint="it may keep too few: raise its samples_mib and participant_samples_mib",
        )
        self.places = places


class SplitPlane:
    """Requests of one run's split plane.

    A batch is smashed data [B, T, D], or the ids [B, 16] (uint8) of samples that the server keeps.
    Features come back as [B, T', D]: T' are all tokens, prompts included, or with
    ``wire.pooled_features`` those that the tail reads.

    Args:
        server: authenticated.
        run: the run's settings.
        copies_bytes: how much memory the copies of what was sent may take.

    Attributes:
        copies: of what the server has of the training samples, where their changes are sent.
    """

    def __init__(self, server: Server, run: RunPlan, copies_bytes: int = 256 * 1024 * 1024) -> None:
        self._server = server
        self._wire = run.wire
        self.copies: DeltaCache | None = None
        if run.wire.delta_smashed is not None:
            self.copies = DeltaCache(
                run.wire.smashed, run.wire.delta_smashed, run.wire.skip_below, copies_bytes
            )
        split = run.model
        sizes = anatomy(split)
        num_tokens = needed_tokens(split) if run.wire.pooled_features else None
        tokens = sizes.tokens + split.prompt_count
        self._features = (tokens if num_tokens is None else num_tokens, sizes.width)

    def forward(self, batch: Tensor | DeltaBatch, *, step: str, round_: int) -> Tensor:
        """Features [B, T', D] of smashed data [B, T, D]; the server keeps the step.

        Raises:
            SamplesMissing: the server lacks copies that a revision is against; forget them too,
                then send another revision under another name.
        """
        meta = {"step": step, "round": round_}
        tensors = batch.tensors if isinstance(batch, DeltaBatch) else self._batch(batch)
        reply = self._server.ask(FORWARD_PATH, "forward", meta, tensors)
        if isinstance(batch, DeltaBatch):
            _require_kept(reply, len(batch))
        return _tensor(reply, "features", (len(batch), *self._features))

    def backward(
        self,
        gradients: Tensor,
        *,
        step: str,
        round_: int,
        smashed: tuple[int, ...],
        noise: torch.Generator | None = None,
    ) -> Tensor:
        """The gradient [B, T, D] of a step's smashed data, from that of its features.

        Args:
            gradients: [B, T', D].
            step, round_: as in the step's `forward`.
            smashed: the shape of what comes back.
            noise: rounds the gradients at random, where their codec rounds.
        """
        reply = self._server.ask(
            BACKWARD_PATH,
            "backward",
            {"step": step, "round": round_},
            {"gradients": (gradients, self._wire.gradients)},
            _rounding(noise),
        )
        return _tensor(reply, "gradients", smashed)

    def body_forward(self, smashed: Tensor, meta: BodyStepMeta) -> Tensor:
        """Features [B, T', D] of smashed data [B, T, D], through this session's own body.

        A session begins when the server has room for its body, however long others have theirs: the
        round's end ends the waiting.

        Raises:
            StepLost: the session is gone; begin the round anew.
            StaleRound: the round is over.
        """
        batch = self._batch(smashed)
        while True:
            try:
                reply = self._server.ask(FORWARD_PATH, "forward", meta.model_dump(), batch)
                break
            except Busy:
                if meta.number > 0:
                    raise
        return _tensor(reply, "features", (len(smashed), *self._features))

    def body_backward(
        self,
        gradients: Tensor,
        meta: BodyStepMeta,
        smashed: tuple[int, ...],
        noise: torch.Generator | None = None,
    ) -> Tensor:
        """The gradient [B, T, D] of the smashed data; the session's body is tuned, once.

        Arguments and errors are those of `backward` and `body_forward`.
        """
        tensors = {"gradients": (gradients, self._wire.gradients)}
        rounding = _rounding(noise)
        reply = self._server.ask(BACKWARD_PATH, "backward", meta.model_dump(), tensors, rounding)
        return _tensor(reply, "gradients", smashed)

    def exchange(
        self,
        meta: ExchangeMeta,
        gradients: Tensor | None,
        batch: Tensor | None,
        noise: torch.Generator | None = None,
    ) -> Tensor | None:
        """The gradients [B, T', D] of the last batch up; features [B, T', D] of the next one down.

        ``noise`` rounds the gradients at random, where their codec rounds.

        Raises:
            SamplesMissing: keep them first, then send the same again.
            StepLost: the session is gone; begin the round anew.
        """
        tensors: dict[str, tuple[Tensor, str]] = {}
        if gradients is not None:
            tensors["gradients"] = (gradients, self._wire.gradients)
        if batch is not None:
            tensors |= self._batch(batch)
        rounding = _rounding(noise)
        reply = self._server.ask(EXCHANGE_PATH, "exchange", meta.model_dump(), tensors, rounding)
        if batch is None:
            require_kind(reply, "features")
            return None
        _require_kept(reply, len(batch))
        return _tensor(reply, "features", (len(batch), *self._features))

    def infer(self, batch: Tensor, *, step: str, round_: int, state: str | None = None) -> Tensor:
        """Features [B, T', D] of a batch; the server keeps nothing.

        ``state`` is the global state whose tail will read them; None: whichever is the newest.

        Raises:
            SamplesMissing: as in `exchange`.
            StaleRound: the server's prompts are of a newer state.
        """
        meta = {"step": step, "round": round_, "state": state}
        reply = self._server.ask(INFER_PATH, "infer", meta, self._batch(batch))
        _require_kept(reply, len(batch))
        return _tensor(reply, "features", (len(batch), *self._features))

    def keep(self, ids: Tensor, smashed: Tensor) -> None:
        """Smashed data [B, T, D] for the server to keep under these ids [B, 16]."""
        tensors = {"ids": (ids, "uint8"), "smashed": (smashed, self._wire.smashed)}
        require_kind(self._server.ask(SAMPLES_PATH, "samples", {}, tensors), "kept")

    def missing(self, ids: Tensor) -> list[int]:
        """Which of these samples [B, 16] the server does not keep, by their places."""
        lacking: list[int] = []
        for start in range(0, len(ids), _IDS_AT_ONCE):
            asked = ids[start : start + _IDS_AT_ONCE]
            reply = self._server.ask(MISSING_PATH, "missing", {}, {"ids": (asked, "uint8")})
            lacking += [start + place for place in _places(reply, len(asked))]
        return lacking

    def _batch(self, batch: Tensor) -> Payload:
        if batch.dtype == torch.uint8:
            return {"ids": (batch.reshape(-1, SAMPLE_ID_BYTES), "uint8")}
        return {"smashed": (batch, self._wire.smashed)}


def _rounding(noise: torch.Generator | None) -> dict[str, torch.Generator]:
    return {} if noise is None else {"gradients": noise}


def _require_kept(reply: Frame, named: int) -> None:
    if reply.kind == "missing":
        places = _places(reply, named)
        if not places:
            raise MalformedFrame("the server lacks samples and names none", field="places")
        raise SamplesMissing(places)


def _places(reply: Frame, named: int) -> list[int]:
    require_kind(reply, "missing")
    spec = reply.spec("places")
    if spec.codec != "int64" or len(spec.shape) != 1 or spec.shape[0] > named:
        raise MalformedFrame(
            "places are whole numbers, at most one for each sample",
            field="places",
            limit=[named],
            value=list(spec.shape),
        )
    places: list[int] = reply.tensor("places").tolist()
    if places != sorted(set(places)) or not all(0 <= place < named for place in places):
        raise MalformedFrame(
            "the server names samples that the request did not", field="places", limit=named
        )
    return places


def _tensor(reply: Frame, name: str, shape: tuple[int, ...]) -> Tensor:
    require_kind(reply, name)
    if reply.spec(name).shape != tuple(shape):
        raise MalformedFrame(
            "the server answered with a tensor of another shape",
            field=name,
            limit=list(shape),
            value=list(reply.spec(name).shape),
        )
    tensor = reply.tensor(name)
    if not tensor.is_floating_point():
        raise MalformedFrame("the server answered with whole numbers", field=name)
    return tensor.to(torch.float32)


_FLOAT_BYTES = 4

_HEADER_BYTES = MIB


def max_samples_per_frame(head: Head, most: int) -> int:
    """At most ``most``, and fewer where all their tokens in float32 would be over the limit.

    Tokens are those of the body, prompts included: answers may be as large as what was sent.
    """
    tokens = head.sizes.tokens + head.settings.prompt_count
    row = tokens * head.sizes.width * _FLOAT_BYTES
    return max(1, min(most, (DEFAULT_LIMITS.max_frame_bytes - _HEADER_BYTES) // row))
