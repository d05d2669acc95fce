"""Client of the split plane: tensors up, tensors down, in the run's codecs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_client.transport.client import Server
from protocol.arrays import Array, Generator
from protocol.errors import Busy, MalformedFrame, SFPromptError
from protocol.frames import Frame, require_kind
from protocol.messages import SAMPLE_ID_BYTES, BodyStepMeta, ExchangeMeta
from protocol.plan import RunPlan
from protocol.untyped import STATUS_FIELD
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    LABELS_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
    SOLVE_PATH,
    START_PATH,
)
from split_model.linear_fit import Features, Fit

_MAX_IDS = 16_384  # in one request

_OTHERS_S = 20.0  # for which the server holds a request of round 0 back

Floats = NDArray[np.float32]

Ids = NDArray[np.uint8]

Labels = NDArray[np.int64]

Payload = Mapping[str, tuple[Array, str]]


class SamplesMissing(SFPromptError):
    """The server's cache lacks samples that a request names; the request changed nothing.

    Attributes:
        places: indices of the missing samples in the request, ascending.
    """

    def __init__(self, places: list[int]) -> None:
        super().__init__(
            "the server's cache lacks samples that this device has sent",
            field="ids",
            limit=0,
            value=len(places),
            hint="its cache may be too small: raise samples_mib and participant_samples_mib",
        )
        self.places = places


class SplitPlane:
    """Sends the requests of one run's split plane.

    It takes NumPy arrays or torch tensors, and returns NumPy arrays of float32.

    A batch is smashed data [B, T, D], or the ids [B, 16] (uint8) of samples in the server's cache.
    Features are [B, T', D]: T' counts all tokens, prompts included, or with
    ``wire.pooled_features`` only those that the tail reads.

    Args:
        server: authenticated.
        run: the run's settings.
        features: shape of one sample's features, [T', D'].
        smashed: codec of smashed data; None: that of training.
    """

    def __init__(
        self,
        server: Server,
        run: RunPlan,
        features: tuple[int, int],
        smashed: str | None = None,
    ) -> None:
        self._server = server
        self._wire = run.wire
        self._smashed = smashed or run.wire.smashed
        self._features = features
        self._is_classified = bool(run.model.depths)  # by the server, in an inference
        self._classes = run.model.num_classes

    def forward(self, batch: Array, *, step: str, round_: int) -> Floats:
        """Compute the features [B, T', D] of smashed data [B, T, D]; the server retains the step.

        Args:
            batch: smashed data.
            step: the step's name, unique in the run.
            round_: the round's number.
        """
        response = self._send_forward(self._batch(batch), step, round_)
        return _tensor(response, "features", (len(batch), *self._features))

    def forward_payload(self, payload: Payload, samples: int, *, step: str, round_: int) -> Floats:
        """Like `forward`, for a batch in a form that only the tuning method's two sides know.

        Args:
            payload: the request's tensors, each with its codec.
            samples: number of samples in the batch.
            step: as for `forward`.
            round_: as for `forward`.

        Raises:
            SamplesMissing: the server lacks samples that the payload names. Send another payload
                under a new name.
        """
        response = self._send_forward(payload, step, round_)
        _check_none_missing(response, samples)
        return _tensor(response, "features", (samples, *self._features))

    def _send_forward(self, payload: Payload, step: str, round_: int) -> Frame:
        meta = {"step": step, "round": round_}
        return self._server.send_frame(FORWARD_PATH, "forward", meta, payload)

    def backward(
        self,
        gradients: Array,
        *,
        step: str,
        round_: int,
        smashed: tuple[int, ...],
        noise: Generator | None = None,
    ) -> Floats:
        """Compute the gradient [B, T, D] of a step's smashed data from that of its features.

        Args:
            gradients: [B, T', D].
            step: as in the step's `forward`.
            round_: as in the step's `forward`.
            smashed: the shape of the smashed data.
            noise: generator for stochastic rounding; None: round to nearest.

        Raises:
            StepLost: the server no longer retains the step.
        """
        response = self._server.send_frame(
            BACKWARD_PATH,
            "backward",
            {"step": step, "round": round_},
            {"gradients": (gradients, self._wire.gradients)},
            _rounding(noise),
        )
        return _tensor(response, "gradients", smashed)

    def body_forward(self, smashed: Array, meta: BodyStepMeta) -> Floats:
        """Compute the features [B, T', D] of smashed data [B, T, D] with the session's tuned body.

        The first step waits until the server has memory for another body, at most until the round
        is over.

        Raises:
            StepLost: the server lost the session; start the round again.
            StaleRound: the round is over.
        """
        batch = self._batch(smashed)
        while True:
            try:
                response = self._server.send_frame(
                    FORWARD_PATH, "forward", meta.model_dump(), batch
                )
                break
            except Busy:
                if meta.number > 0:
                    raise
        return _tensor(response, "features", (len(smashed), *self._features))

    def body_backward(
        self,
        gradients: Array,
        meta: BodyStepMeta,
        smashed: tuple[int, ...],
        noise: Generator | None = None,
    ) -> Floats:
        """Compute the smashed data's gradient [B, T, D]; the server tunes the session's body.

        Arguments and errors are those of `backward` and `body_forward`.
        """
        tensors = {"gradients": (gradients, self._wire.gradients)}
        rounding = _rounding(noise)
        response = self._server.send_frame(
            BACKWARD_PATH, "backward", meta.model_dump(), tensors, rounding
        )
        return _tensor(response, "gradients", smashed)

    def exchange(
        self,
        meta: ExchangeMeta,
        gradients: Array | None,
        batch: Array | None,
        noise: Generator | None = None,
    ) -> Floats | None:
        """Send the last batch's gradients and request the next batch's features.

        Args:
            meta: the exchange's number in its session.
            gradients: [B, T', D] of the last batch; None: this is the first exchange.
            batch: the next batch; None: this is the last exchange.
            noise: generator for stochastic rounding; None: round to nearest.

        Returns:
            The next batch's features [B, T', D]; None at the last exchange.

        Raises:
            SamplesMissing: upload these samples, then send the same exchange again.
            StepLost: the server lost the session; start the round again.
        """
        tensors: dict[str, tuple[Array, str]] = {}
        if gradients is not None:
            tensors["gradients"] = (gradients, self._wire.gradients)
        if batch is not None:
            tensors |= self._batch(batch)
        rounding = _rounding(noise)
        response = self._server.send_frame(
            EXCHANGE_PATH, "exchange", meta.model_dump(), tensors, rounding
        )
        if batch is None:
            require_kind(response, "features")
            return None
        _check_none_missing(response, len(batch))
        return _tensor(response, "features", (len(batch), *self._features))

    def infer(self, batch: Array, *, step: str, round_: int, state: str | None = None) -> Floats:
        """Compute the features [B, T', D] of a batch; the server retains nothing.

        With ``depths`` the result is logits [B, C]: the server has the tail.

        Args:
            batch: smashed data or ids.
            step: names the request.
            round_: the round's number.
            state: SHA-256 of the global state whose prompts to use; None: the newest.

        Raises:
            SamplesMissing: upload these samples, then send the same request again.
            StaleRound: the server's prompts are of a newer state.
        """
        meta = {"step": step, "round": round_, "state": state}
        response = self._server.send_frame(INFER_PATH, "infer", meta, self._batch(batch))
        _check_none_missing(response, len(batch))
        if self._is_classified:
            return _tensor(response, "logits", (len(batch), self._classes))
        return _tensor(response, "features", (len(batch), *self._features))

    def start(self, ids: Ids, round_: int, attempt: int) -> Features:
        """Name all training samples by their ids [n, 16]; return their features.

        In round 0 it waits for the other participants, at most until the round is over.

        Raises:
            SamplesMissing: upload these samples, then send the same request again.
            StaleRound: the round is over, or the server started it without this participant.
        """
        tensors = {"ids": (ids, "uint8")}
        response = self._wait_for_others(START_PATH, "start", round_, attempt, tensors)
        _check_none_missing(response, len(ids))
        rank = self._features[-1]
        values = _tensor(response, "features", (len(ids), *self._features), kind="start")
        return Features(
            values=values.reshape(len(ids), -1),
            mean=_tensor(response, "mean", (rank,), kind="start"),
            variances=_tensor(response, "variances", (rank,), kind="start"),
            strength=_tensor(response, "strength", (1,), kind="start").item(),
        )

    def solve(self, sums: Array, counts: Array, attempt: int, samples: int, round_: int = 0) -> Fit:
        """Send sums of features in each class [C, r] and counts [C]; return the classifier.

        In round 0 it waits for the other participants, at most until the round is over.

        Args:
            sums, counts: of this device's samples.
            attempt: at the round.
            samples: number of samples n.
            round_: a later round, for a device that has requested its features in it.

        Raises:
            StepLost: the server lost the features; start the round again.
        """
        tensors = {"sums": (sums, "float32"), "counts": (counts, "float32")}
        response = self._wait_for_others(SOLVE_PATH, "solve", round_, attempt, tensors)
        return Fit(
            weight=_tensor(response, "weight", tuple(sums.shape), kind="solve"),
            bias=_tensor(response, "bias", (len(counts),), kind="solve"),
            leverage=_tensor(response, "leverage", (samples,), kind="solve"),
            strength=_tensor(response, "strength", (1,), kind="solve").item(),
        )

    def _wait_for_others(
        self, path: str, kind: str, round_: int, attempt: int, tensors: Payload
    ) -> Frame:
        meta = {"round": round_, "attempt": attempt}
        while True:
            try:
                return self._server.send_frame(path, kind, meta, tensors, waits_s=_OTHERS_S)
            except Busy as error:
                if error.field == STATUS_FIELD:  # an HTTP proxy's, which knows of no others
                    raise

    def store_samples(self, ids: Ids, smashed: Array) -> None:
        """Store smashed data [B, T, D] in the server's cache under these ids [B, 16]."""
        tensors = {"ids": (ids, "uint8"), "smashed": (smashed, self._smashed)}
        response = self._server.send_frame(SAMPLES_PATH, "samples", {}, tensors)
        require_kind(response, "kept")

    def share_labels(self, train: tuple[Ids, Labels], test: tuple[Ids, Labels]) -> None:
        """Send the labels of all training and test samples; the server then needs no device.

        Args:
            train, test: ids [n, 16] and labels [n] of each.

        Raises:
            SamplesMissing: upload these samples, training before test samples, and send the labels
                again.
        """
        tensors: dict[str, tuple[Array, str]] = {}
        for kind, (ids, labels) in (("train", train), ("test", test)):
            if len(ids):
                tensors |= {f"{kind}_ids": (ids, "uint8"), f"{kind}_labels": (labels, "int64")}
        response = self._server.send_frame(LABELS_PATH, "labels", {}, tensors)
        _check_none_missing(response, len(train[0]) + len(test[0]))
        require_kind(response, "kept")

    def missing(self, ids: Ids) -> list[int]:
        """Return the indices of those ids [B, 16] that the server's cache lacks."""
        missing: list[int] = []
        for start in range(0, len(ids), _MAX_IDS):
            tensors = {"ids": (ids[start : start + _MAX_IDS], "uint8")}
            response = self._server.send_frame(MISSING_PATH, "missing", {}, tensors)
            requested = len(tensors["ids"][0])
            missing += [start + place for place in _missing_places(response, requested)]
        return missing

    def _batch(self, batch: Array) -> Payload:
        if "uint8" in str(batch.dtype):
            return {"ids": (batch.reshape(-1, SAMPLE_ID_BYTES), "uint8")}
        return {"smashed": (batch, self._smashed)}


def _rounding(noise: Generator | None) -> dict[str, Generator]:
    return {} if noise is None else {"gradients": noise}


def _check_none_missing(response: Frame, requested: int) -> None:
    if response.kind == "missing":
        places = _missing_places(response, requested)
        if not places:
            raise MalformedFrame(
                "the server reports missing samples and names none", field="places"
            )
        raise SamplesMissing(places)


def _missing_places(response: Frame, requested: int) -> list[int]:
    require_kind(response, "missing")
    spec = response.spec("places")
    if spec.codec != "int64" or len(spec.shape) != 1 or spec.shape[0] > requested:
        raise MalformedFrame(
            "places have to be integers, at most one for each requested sample",
            field="places",
            limit=[requested],
            value=list(spec.shape),
        )
    places: list[int] = response.array("places").tolist()
    if places != sorted(set(places)) or not all(0 <= place < requested for place in places):
        raise MalformedFrame(
            "the server names samples that were not requested", field="places", limit=requested
        )
    return places


def _tensor(response: Frame, name: str, shape: tuple[int, ...], kind: str | None = None) -> Floats:
    require_kind(response, kind or name)
    if response.spec(name).shape != tuple(shape):
        raise MalformedFrame(
            "the server answered with a tensor of another shape",
            field=name,
            limit=list(shape),
            value=list(response.spec(name).shape),
        )
    array = response.array(name)
    if array.dtype.kind != "f":
        raise MalformedFrame("the server answered with integers, not floats", field=name)
    return np.require(array, np.float32, ["W"])
