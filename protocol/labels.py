"""What a run does with labels: one setting, ``device``, ``noised:E`` or ``shared``.

*device*: labels stay on the device, though what it sends can reveal them. *noised*: the same, but
some labels are replaced at random before they are used. *shared*: the server gets the labels.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

__all__ = ["SHARED", "LabelUse", "label_epsilon"]

SHARED = "shared"

_MAX_EPSILON = 100.0

_ALLOWED = "device | noised:E, with E above 0 and at most 100 | shared"

_NOISED = re.compile(r"noised:([0-9]{1,3}(?:\.[0-9]{1,6})?)")


def label_epsilon(labels: str) -> float | None:
    """Return the epsilon of ``noised:E``; None: labels are not replaced."""
    match = _NOISED.fullmatch(labels)
    return None if match is None else float(match[1])


def _check(labels: str) -> str:
    epsilon = label_epsilon(labels)
    if labels in ("device", SHARED) or (epsilon is not None and 0 < epsilon <= _MAX_EPSILON):
        return labels
    raise PydanticCustomError("labels", "must be {expected}", {"expected": _ALLOWED})


LabelUse = Annotated[str, AfterValidator(_check)]
