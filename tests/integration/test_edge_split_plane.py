"""The split plane as a server of raw sockets sees it: what goes up, and what may come down."""

import struct
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from edge_client.torch_model import wire_shape
from edge_client.transport.client import Server
from edge_client.transport.split_client import SamplesMissing, SplitPlane
from protocol.errors import InvalidField, MalformedFrame, StaleRound, StepLost, UnsupportedVersion
from protocol.frames import Frame, decode_frame, encode_frame, join_frame
from protocol.messages import ExchangeMeta
from protocol.plan import RunPlan, WirePlan
from tests.support.edge import SMALL, RawServer, Recorder, Request, as_json, impatient, response

X = torch.randn((2, 1 + 4 + 4, 64), generator=torch.Generator().manual_seed(0))  # with prompts

BARE = X[:, :5]  # class token and 2 x 2 patches

IDS = torch.arange(32, dtype=torch.uint8).reshape(2, 16)

META = ExchangeMeta(session="s", round=3, attempt=1, number=1, steps=2)


def plane(server: Server, prompt_at: str = "input", **wire: Any) -> SplitPlane:
    model = SMALL.model_copy(update={"prompt_at": prompt_at})
    plan = RunPlan(model=model, wire=WirePlan.model_validate(wire))
    return SplitPlane(server, plan, wire_shape(model, plan.wire.pooled_features))


def frame(kind: str, name: str, tensor: Tensor, codec: str = "float32") -> bytes:
    return frame_of(kind, **{name: (tensor, codec)})


def frame_of(kind: str, **tensors: tuple[Tensor, str]) -> bytes:
    return response(bytes(join_frame(encode_frame(kind, {}, tensors))))


def sent(request: Request) -> Frame:
    return decode_frame(request.body)


def test_a_step_and_an_inference() -> None:
    serve = Recorder(
        frame("features", "features", X + 1),
        frame("gradients", "gradients", X + 2),
        frame("features", "features", X, "bfloat16"),
    )
    with RawServer(serve) as raw:
        server = impatient(raw)
        split = plane(server, smashed="float16", gradients="bfloat16")
        assert np.array_equal(split.forward(X, step="s", round_=3), X + 1)
        returned = split.backward(X, step="s", round_=3, smashed=tuple(X.shape))
        assert np.array_equal(returned, X + 2)
        assert np.array_equal(split.infer(X, step="t", round_=3), X.bfloat16().float())
        server.close()
    kinds = ["forward", "backward", "infer"]
    assert [r.target for r in serve.requests] == [f"/v1/split/{kind}" for kind in kinds]
    frames = [sent(request) for request in serve.requests]
    assert [f.kind for f in frames] == kinds
    assert [dict(f.meta) for f in frames] == [
        {"step": "s", "round": 3},
        {"step": "s", "round": 3},
        {"step": "t", "round": 3, "state": None},
    ]
    assert torch.equal(frames[0].tensor("smashed"), X.half())
    assert torch.equal(frames[1].tensor("gradients"), X.bfloat16())


def test_an_exchange_carries_gradients_up_and_features_down() -> None:
    serve = Recorder(frame("features", "features", X + 1), frame_of("features"))
    with RawServer(serve) as raw:
        server = impatient(raw)
        split = plane(server, "cut")
        assert np.array_equal(split.exchange(META, X, BARE), X + 1)
        last = META.model_copy(update={"number": 2})
        assert split.exchange(last, X, None) is None
        server.close()
    assert [r.target for r in serve.requests] == ["/v1/split/exchange"] * 2
    first, second = (sent(request) for request in serve.requests)
    assert (first.kind, dict(first.meta)) == ("exchange", META.model_dump())
    assert set(first.specs) == {"gradients", "smashed"}
    assert torch.equal(first.tensor("gradients"), X)
    assert torch.equal(first.tensor("smashed"), BARE)
    assert set(second.specs) == {"gradients"}


def test_samples_go_up_once_and_then_by_their_ids() -> None:
    serve = Recorder(
        frame("missing", "places", torch.tensor([1]), "int64"),
        frame_of("kept"),
        frame("features", "features", X),
        frame("features", "features", X),
    )
    with RawServer(serve) as raw:
        server = impatient(raw)
        split = plane(server, "cut", keep_smashed=True, smashed="float16")
        assert split.missing(IDS) == [1]
        split.store_samples(IDS[1:], BARE[1:])
        split.exchange(META.model_copy(update={"number": 0}), None, IDS)
        split.infer(IDS, step="t", round_=3)
        server.close()
    names = ["missing", "samples", "exchange", "infer"]
    assert [r.target for r in serve.requests] == [f"/v1/split/{name}" for name in names]
    frames = [sent(request) for request in serve.requests]
    assert [f.kind for f in frames] == names
    assert [set(f.specs) for f in frames] == [{"ids"}, {"ids", "smashed"}, {"ids"}, {"ids"}]
    assert all(f.specs["ids"].codec == "uint8" for f in frames)
    assert torch.equal(frames[1].tensor("ids"), IDS[1:])
    assert torch.equal(frames[1].tensor("smashed"), BARE[1:].half())
    assert all(torch.equal(frames[n].tensor("ids"), IDS) for n in (0, 2, 3))


def test_an_answer_may_name_the_samples_that_are_missing() -> None:
    answer = frame("missing", "places", torch.tensor([0, 1]), "int64")
    with RawServer(Recorder(answer)) as raw:
        server = impatient(raw)
        split = plane(server, "cut", keep_smashed=True)
        for ask in (
            lambda: split.exchange(META, X, IDS),
            lambda: split.infer(IDS, step="t", round_=3),
        ):
            with pytest.raises(SamplesMissing) as caught:
                ask()
            assert caught.value.places == [0, 1]
        server.close()


@pytest.mark.parametrize(
    "places",
    [torch.tensor([2]), torch.tensor([-1]), torch.tensor([2**62]), torch.tensor([0.0])],
)
def test_samples_that_were_never_named_cannot_be_missing(places: Tensor) -> None:
    codec = "float32" if places.is_floating_point() else "int64"
    with RawServer(Recorder(frame("missing", "places", places, codec))) as raw:
        server = impatient(raw)
        split = plane(server, "cut", keep_smashed=True)
        for ask in (
            lambda: split.missing(IDS),
            lambda: split.exchange(META, X, IDS),
            lambda: split.infer(IDS, step="t", round_=3),
        ):
            with pytest.raises(MalformedFrame):
                ask()
        server.close()


def test_pooled_features_are_the_tokens_that_the_tail_reads() -> None:
    pooled = X[:, :1].contiguous()  # the class token
    with RawServer(Recorder(frame("features", "features", pooled))) as raw:
        server = impatient(raw)
        features = plane(server, pooled_features=True).forward(X, step="s", round_=1)
        assert np.array_equal(features, pooled)
        with pytest.raises(MalformedFrame):
            plane(server).forward(X, step="s", round_=1)
        server.close()


def test_gradients_are_rounded_at_random_but_always_alike() -> None:
    """A repeat is the same request: its noise is that of its step, whatever the step is called."""
    serve = Recorder(frame("gradients", "gradients", X))
    with RawServer(serve) as raw:
        server = impatient(raw)
        split = plane(server, gradients="int8")
        for seed in (1, 1, 2, None):
            noise = None if seed is None else torch.Generator().manual_seed(seed)
            split.backward(X, step="s", round_=1, smashed=tuple(X.shape), noise=noise)
        server.close()
    first, again, other, nearest = (sent(r).tensor("gradients") for r in serve.requests)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, nearest)


def test_features_can_be_trained_on() -> None:
    """The tensor lies in the response's own buffer, and nobody else writes there."""
    with RawServer(Recorder(frame("features", "features", X))) as raw:
        server = impatient(raw)
        features = torch.from_numpy(plane(server).forward(X, step="s", round_=1)).requires_grad_()
        other = plane(server).forward(X, step="t", round_=1)
        other += 1
        (features * 2).sum().backward()
        assert torch.equal(features.grad, torch.full_like(X, 2))
        assert torch.equal(features, X)
        server.close()


@pytest.mark.parametrize("error", [StaleRound, StepLost])
def test_stale_rounds_and_lost_steps_are_not_retried(error: type[StaleRound | StepLost]) -> None:
    serve = Recorder(as_json(error("too late").to_wire(), "409 x"))
    with RawServer(serve) as raw:
        server = Server(raw.url)
        with pytest.raises(error):
            plane(server).forward(X, step="1", round_=1)
        server.close()
    assert len(serve.requests) == 1


MALFORMED = [
    response(b""),
    response(b"SFPF"),
    frame("features", "features", torch.ones(2, 9, 191)),
    frame("features", "features", torch.ones(2, 1, 64)),
    frame("features", "features", torch.ones(2 * 9 * 64)),
    frame("features", "other", X),
    frame("features", "features", X.long(), "int64"),
]

DAMAGED = [
    response(b"<html>" * 100),
    response(frame("features", "features", X).split(b"\r\n\r\n", 1)[1][:-64]),
    frame("features", "features", X)[:-1] + b"\x01",
]


@pytest.mark.parametrize("answer", MALFORMED)
def test_a_malformed_frame_is_refused_and_not_requested_again(answer: bytes) -> None:
    serve = Recorder(answer)
    with RawServer(serve) as raw:
        server = Server(raw.url)
        with pytest.raises(MalformedFrame):
            plane(server).forward(X, step="s", round_=1)
        server.close()
    assert len(serve.requests) == 1


@pytest.mark.parametrize("answer", DAMAGED)
def test_a_damaged_response_is_requested_again(answer: bytes) -> None:
    serve = Recorder(answer, answer, frame("features", "features", X))
    with RawServer(serve) as raw:
        server = Server(raw.url)
        assert np.array_equal(plane(server).forward(X, step="s", round_=1), X)
        server.close()
    assert len(serve.requests) == 3
    assert len({request.body for request in serve.requests}) == 1


def test_frames_of_another_kind_or_version_are_refused() -> None:
    head, newer = frame("features", "features", X).split(b"\r\n\r\n", 1)
    newer = newer[:4] + b"\x03" + newer[5:]
    newer = newer[:20] + struct.pack("<Q", xxh3_64_intdigest(newer[:20] + newer[28:])) + newer[28:]
    other = frame("update", "features", X)
    with RawServer(Recorder(other, other, other, head + b"\r\n\r\n" + newer)) as raw:
        server = impatient(raw)
        split = plane(server, "cut", keep_smashed=True)
        for ask in (
            lambda: split.infer(IDS, step="s", round_=1),
            lambda: split.missing(IDS),
            lambda: split.store_samples(IDS, BARE),
        ):
            with pytest.raises(InvalidField):
                ask()
        with pytest.raises(UnsupportedVersion):
            split.infer(IDS, step="s", round_=1)
        server.close()
