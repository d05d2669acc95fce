"""The runs that faults are injected into: one for each form of the method, small and exact."""

from __future__ import annotations

from typing import Any

from protocol.settings import RunSettings

DEVICES = 2

TRAIN, TEST = 80, 24  # images of the digits, over all devices

_MODEL = {"backbone": "test_vit", "weights": "random:3", "image_size": 32, "num_classes": 10}

_METHODS: dict[str, dict[str, Any]] = {
    "start": {"name": "sfprompt"},
    "prompts": {"name": "sfprompt", "split_epochs": 1, "prompt_count": 4},
    "paper": {"name": "sfprompt-paper", "prompt_count": 4},
}

_BATCHES = {"start": 8, "prompts": 8, "paper": 8}

FORMS = tuple(_METHODS)


def settings_of(form: str) -> RunSettings:
    """Return the settings of a form's run: two rounds, and no round without every device."""
    return RunSettings.model_validate(
        {
            "name": f"chaos-{form}",
            "seed": 7,
            "model": _MODEL,
            "method": _METHODS[form],
            "federation": {
                "rounds": 2,
                "min_participants": DEVICES,
                "min_updates": DEVICES,
            },
            "training": {"batch_size": _BATCHES[form]},
        }
    )
