"""Fuzzing of frames: what it makes, what it finds, and that it finds nothing now."""

from __future__ import annotations

import random

import pytest

from protocol.codecs import get_codec
from protocol.frames import decode_frame
from protocol.messages import parse_message
from sfprompt_bench.fuzz import frames
from sfprompt_bench.fuzz.corpus import CODECS, METAS, valid_frames, valid_messages
from sfprompt_bench.fuzz.frames import fuzz_frames
from sfprompt_bench.fuzz.mutations import mutated_frame, resealed


def ignore(_done: int) -> None:
    pass


def test_mutated_frames_and_messages_raise_only_typed_errors() -> None:
    report = fuzz_frames(20_000, 0, ignore)
    assert report.findings == [], "\n".join(report.lines())
    assert report.inputs == 20_000
    assert report.outcomes["decoded"] > 500, "mutations reach what lies behind the checks"


def test_the_same_seed_makes_the_same_inputs() -> None:
    first, second = fuzz_frames(100, 5, ignore), fuzz_frames(100, 5, ignore)
    assert first.outcomes == second.outcomes


def test_the_valid_frames_have_every_codec_and_kind() -> None:
    made = valid_frames()
    assert {codec for frame in made for codec in frame.codecs} == set(CODECS)
    assert {frame.kind for frame in made} == set(METAS)
    for frame in made:
        assert set(decode_frame(frame.data).tensors()) == {
            f"tensor-{number}" for number in range(len(frame.codecs))
        }
    for message_type, text in valid_messages():
        assert message_type.model_validate_json(text)
    for kind, meta in METAS.values():
        if kind is not None:
            parse_message(kind, meta)


def test_most_mutations_reach_behind_the_checksum() -> None:
    draws = random.Random(0)
    valid = valid_frames()[0].data
    mutated = [bytes(mutated_frame(valid, draws)) for _ in range(200)]
    sealed = [data for data in mutated if bytes(resealed(bytearray(data))) == data]
    assert len(sealed) > 140
    assert len(set(sealed)) > 100


def test_a_decoder_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise IndexError("beyond the end")

    monkeypatch.setattr(type(get_codec("int8")), "decode", fail)
    report = fuzz_frames(800, 0, ignore)
    assert report.findings
    assert "IndexError: beyond the end" in report.findings[0].outcome
    again = fuzz_frames(1, report.findings[0].seed, ignore)
    assert again.findings[0].outcome == report.findings[0].outcome
    assert f"FOUND seed {report.findings[0].seed}" in "\n".join(report.lines())


def test_a_decoder_that_takes_long_or_much_memory_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "_INPUT_S", 0.0)
    monkeypatch.setattr(frames, "_MEMORY_BYTES", -1)
    outcomes = {finding.outcome.split(",")[0] for finding in fuzz_frames(50, 0, ignore).findings}
    assert any(outcome.startswith("took") for outcome in outcomes)
    assert "took more memory than the limit" in outcomes
