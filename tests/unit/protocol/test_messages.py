import json
import math

import pytest

from protocol.codec_names import FLOAT_CODECS
from protocol.errors import InvalidField
from protocol.messages import (
    Assignment,
    BlobRef,
    EvaluationReport,
    ExchangeMeta,
    JoinRequest,
    RunStatus,
    SamplesMeta,
    StepMeta,
    UpdateMeta,
    parse_message,
)
from protocol.plan import RunPlan

JOIN = {"name": "pi", "train_samples": 5, "test_samples": 2, "num_classes": 10}

BLOB = {"sha256": "0" * 64, "nbytes": 1}

EXCHANGE = {"session": "s", "round": 1, "attempt": 0, "number": 3, "steps": 3}


@pytest.mark.parametrize(
    ("kind", "raw", "field", "limit", "value"),
    [
        (JoinRequest, {**JOIN, "train_samples": -1}, "train_samples", 0, -1),
        (JoinRequest, {**JOIN, "train_samples": 2**53}, "train_samples", 2**53, 2**53),
        (JoinRequest, {**JOIN, "name": ""}, "name", 1, ""),
        (JoinRequest, {**JOIN, "name": "x" * 201}, "name", 200, "x" * 201),
        (JoinRequest, {**JOIN, "labels": "all"}, "labels", None, "all"),
        (JoinRequest, {"name": "pi"}, "train_samples", None, None),
        (JoinRequest, [], "body", None, None),
        (JoinRequest, "text", "body", None, "text"),
        (RunPlan, {"training": {"keep_fraction": 0}}, "training.keep_fraction", 0, 0),
        (RunPlan, {"training": {"keep_fraction": 1.5}}, "training.keep_fraction", 1, 1.5),
        (RunPlan, {"training": {"momentum": 1}}, "training.momentum", 1, 1),
        (
            RunPlan,
            {"wire": {"smashed": "int3"}},
            "wire.smashed",
            ", ".join(FLOAT_CODECS),
            "int3",
        ),
        (RunPlan, {"class_names": ["a", "b"]}, "body", None, None),
        (RunPlan, {"model": {"prompt_at": "cut", "prompt_count": 0}}, "body", None, None),
        (RunPlan, {"wire": {"keep_smashed": True}}, "body", None, None),
        (
            RunPlan,
            {"federation": {"participants_per_round": 1, "min_updates": 2}},
            "federation",
            None,
            None,
        ),
        (BlobRef, {**BLOB, "sha256": "A" * 64}, "sha256", r"^[0-9a-f]{64}$", "A" * 64),
        (
            BlobRef,
            {**BLOB, "sha256": "0" * 64 + "\n"},
            "sha256",
            r"^[0-9a-f]{64}$",
            "0" * 64 + "\n",
        ),
        (StepMeta, {"step": "../x", "round": 1}, "step", r"^[A-Za-z0-9._-]+$", "../x"),
        (StepMeta, {"step": "x" * 65, "round": 1}, "step", 64, "x" * 65),
        (ExchangeMeta, {**EXCHANGE, "steps": 0}, "steps", 1, 0),
        (ExchangeMeta, {**EXCHANGE, "number": 4}, "body", None, None),
        (ExchangeMeta, {**EXCHANGE, "session": "a/b"}, "session", r"^[A-Za-z0-9._-]+$", "a/b"),
        (SamplesMeta, {"round": 1}, "round", None, 1),
    ],
)
def test_an_error_names_field_limit_and_value(kind, raw, field, limit, value):
    with pytest.raises(InvalidField) as caught:
        parse_message(kind, raw)
    assert (caught.value.field, caught.value.limit, caught.value.value) == (field, limit, value)
    assert kind.__name__ in caught.value.message


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_numbers_are_refused_with_a_json_error(loss):
    raw = json.loads(f'{{"round": 1, "attempt": 0, "samples": 3, "train_loss": {loss}}}')
    with pytest.raises(InvalidField) as caught:
        parse_message(UpdateMeta, raw)
    assert caught.value.field == "train_loss"
    assert not math.isfinite(caught.value.value)
    json.dumps(caught.value.to_wire(), allow_nan=False)


@pytest.mark.parametrize(
    "raw", ['{"\\ud800": 1}', '{"name": "\\ud800"}', '{"round": 1' + "0" * 500 + "}"]
)
def test_an_error_about_unusual_json_is_serialisable(raw):
    with pytest.raises(InvalidField) as caught:
        parse_message(UpdateMeta, json.loads(raw))
    json.dumps(caught.value.to_wire(), allow_nan=False, ensure_ascii=False).encode()


def test_an_update_without_samples_is_a_valid_message():
    assert parse_message(UpdateMeta, {"round": 1, "attempt": 0, "samples": 0}).samples == 0


def test_the_number_of_the_last_exchange_equals_steps():
    assert parse_message(ExchangeMeta, EXCHANGE).number == 3


def test_correct_is_at_most_samples():
    report = {"round": 1, "attempt": 0, "samples": 2, "correct": 3, "loss_sum": 1.0}
    with pytest.raises(InvalidField, match=r"correct \(3\) is above samples \(2\)"):
        parse_message(EvaluationReport, report)
    assert parse_message(EvaluationReport, {**report, "correct": 2}).correct == 2


def test_the_default_plan_survives_a_round_trip():
    settings = RunPlan(seed=2**63 - 1)
    assert parse_message(RunPlan, json.loads(settings.model_dump_json())) == settings
    assert parse_message(RunPlan, {}) == RunPlan()


def test_messages_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        parse_message(JoinRequest, JOIN).name = "other"


def test_an_assignment_survives_a_round_trip():
    assignment = Assignment(
        task="train", round=1, state=BLOB, remaining_s=4.5, status=RunStatus.RUNNING
    )
    assert parse_message(Assignment, json.loads(assignment.model_dump_json())) == assignment


@pytest.mark.parametrize("status", RunStatus)
def test_a_run_is_over_if_finished_cancelled_or_failed(status):
    assert status.is_over == (status in ("finished", "cancelled", "failed"))
