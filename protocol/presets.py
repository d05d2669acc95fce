"""The forms of the method: as this project does it by default, and as it was published.

A form is what `RunPlan` leaves open: where the prompts join, how devices train, and what
crosses. Whoever creates a run lays settings of their own over one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from protocol.plan import TrainingPlan, WirePlan

__all__ = ["FORMS", "Form", "over_form"]

Form = Literal["default", "paper"]

FORMS: tuple[Form, ...] = get_args(Form)

# Prompts join in every block of the body, so that smashed data cross once. Many small steps, with
# samples drawn anew in each round. At the same bytes, gradients of 80 % of the samples in 4 bits,
# rounded at random so that they are right in the mean, do better than those of 60 % in 8 bits, and
# than features and gradients of all in 4 bits. Without a warm-up, the first steps of fresh prompts
# are too long: 160 digits a device were at 27 % after 5 rounds, not at 88 %.
_DEFAULT: dict[str, dict[str, Any]] = {
    "model": {"prompt_at": "cut", "prompt_depth": "deep"},
    "training": TrainingPlan(
        keep_fraction=0.8,
        pruning="random",
        local_epochs=0,
        batch_size=8,
        prompt_learning_rate=2e-3,
        tail_learning_rate=1e-2,
        warmup_rounds=1,
    ).model_dump(),
    "wire": WirePlan(
        smashed="int4+zstd",
        features="int8",
        gradients="int4",
        stochastic_rounding=True,
        inference="float16",
        updates="float16",
        update_deltas=True,
        head="int8",
        keep_smashed=True,
        pooled_features=True,
    ).model_dump(),
}

# Rates found by trial on Fashion-MNIST. A device makes few steps a round, so rates are high, which
# needs a warm-up, and batches small; the tail is a classifier on normalised features and stands
# that. Pruning by EL2N over all classes together drops whole classes while the classifier is fresh:
# it is done within each class.
_PAPER: dict[str, dict[str, Any]] = {
    "model": {"prompt_at": "input", "prompt_depth": "shallow"},
    "training": TrainingPlan(
        keep_fraction=0.5,
        prune_per_class=True,
        local_epochs=1,
        local_learning_rate_scale=0.1,
        batch_size=4,
        prompt_learning_rate=1e-2,
        tail_learning_rate=2e-2,
        warmup_rounds=1,
    ).model_dump(),
    "wire": WirePlan().model_dump(),
}

_PARTS = {"default": _DEFAULT, "paper": _PAPER}


def over_form(form: Form, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run's settings, with whatever they leave open as the form has it.

    Args:
        form: of the method.
        values: of `RunPlan`, by part; not validated here, and not changed.
    """
    merged = dict(values)
    for part, of_form in _PARTS[form].items():
        given = values.get(part, {})
        # What is no table is left for the settings' own validation to refuse.
        merged[part] = {**of_form, **given} if isinstance(given, Mapping) else given
    return merged
