"""Settings of a run with `method.name = custom`, from the values of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protocol.parts import BackboneSettings, TrainingSettings, WireSettings
from tuning_methods.custom.settings import OWN_FIELDS

_USER_SETTINGS = {"model": BackboneSettings, "training": TrainingSettings, "wire": WireSettings}


def custom_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values of a `RunPlan`, valid or not, to values of `RunSettings`."""
    result = {**plan}
    own: dict[str, Any] = {**result.pop("method", {})}
    method: dict[str, Any] = {"name": "custom"}
    for part, model in _USER_SETTINGS.items():
        fields = dict(result.pop(part, {}))
        method[part] = {k: v for k, v in fields.items() if k not in model.model_fields}
        result[part] = {k: v for k, v in fields.items() if k in model.model_fields}
    for name, value in own.items():
        (method[OWN_FIELDS[name]] if name in OWN_FIELDS else method)[name] = value
    return result | {"method": method}
