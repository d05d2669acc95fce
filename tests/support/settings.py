"""Values of a plan as the settings of the method that takes them by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protocol.plan import BackboneSettings, TrainingSettings, WireSettings

_WRITTEN = {"model": BackboneSettings, "training": TrainingSettings, "wire": WireSettings}


def by_hand(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `RunPlan`, valid or not, as values of `RunSettings` with `method.name = custom`."""
    result = {**values}
    method: dict[str, Any] = {"name": "custom", "distillation": result.pop("distillation", {})}
    for part, written in _WRITTEN.items():
        fields = dict(result.pop(part, {}))
        method[part] = {k: v for k, v in fields.items() if k not in written.model_fields}
        result[part] = {k: v for k, v in fields.items() if k in written.model_fields}
    return result | {"method": method}
