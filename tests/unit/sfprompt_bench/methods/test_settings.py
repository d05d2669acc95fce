"""Settings of methods: allowed and refused combinations."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.plan import RunPlan

ALONE: dict[str, Any] = {"split_epochs": 0, "keep_fraction": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"training": ALONE},  # the shortcut from head to tail, with a body that has no part in it
        {"training": ALONE, "model": {"cut": 12, "tune": "full", "prompt_count": 0}},
        {"training": ALONE, "model": {"cut": 12, "tune": "classifier", "prompt_depth": "deep"}},
        {"model": {"tune": "bias"}},  # split training tunes the head through the server
        {"model": {"tune": "classifier", "prompt_at": "cut"}},
        {"model": {"tune": "full", "tune_body": True, "prompt_count": 0}},
        {"training": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True}},
        {"training": {"proximal": 0.1}},
        {"federation": {"server_optimizer": "fedyogi", "server_learning_rate": 0.1}},
        {"federation": {"server_optimizer": "fedadam"}, "model": {"prompt_at": "cut"}},
    ],
)
def test_allowed_combinations(settings: dict[str, Any]) -> None:
    parse_message(RunPlan, settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"training": {"split_epochs": 0}}, "keep_fraction"),
        ({"training": {**ALONE, "local_epochs": 0}}, "local_epochs"),
        ({"training": {**ALONE, "local_learning_rate_scale": 0.5}}, "local_learning_rate_scale"),
        ({"training": ALONE, "model": {"prompt_at": "cut"}}, "prompt_at"),
        ({"training": ALONE, "wire": {"gradient_correction": 0.1}}, "gradient_correction"),
        ({"model": {"tune": "everything"}}, "tune"),
        ({"model": {"tune": "full", "prompt_at": "cut"}}, "prompt_at"),
        ({"model": {"adapter_width": 0}}, "adapter_width"),
        ({"model": {"tune_body": True, "prompt_count": 0}}, "tune = full"),
        ({"model": {"tune_body": True, "tune": "full"}}, "prompt_count = 0"),
        ({"training": {"nesterov": True}}, "nesterov"),
        ({"training": {"nesterov": True, "optimizer": "sgd"}}, "momentum"),
        ({"training": {"proximal": 0.1}, "model": {"prompt_at": "cut"}}, "proximal"),
        ({"training": {"proximal": -1}}, "proximal"),
        ({"federation": {"server_optimizer": "sgd"}}, "server_optimizer"),
        ({"federation": {"server_learning_rate": 0.1}}, "server_optimizer"),
        (
            {
                "federation": {"server_optimizer": "fedavgm"},
                "model": {"prompt_init": "mean-token"},
            },
            "mean-token",
        ),
    ],
)
def test_refused_combinations_name_the_field(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_message(RunPlan, settings)
    assert named in f"{caught.value.field} {caught.value.message}"
