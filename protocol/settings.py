"""A run's settings as people write them, in a TOML file, an HTTP request or a program.

The server stores them and sends them to all participants. A device needs only its data and the
server's address.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from protocol.base import Message
from protocol.federation import FederationSettings
from protocol.method import MethodSettings, parse_method
from protocol.parts import BackboneSettings, ClassName, Text, TrainingSettings, WireSettings
from protocol.plan import RunPlan

__all__ = ["RunSettings", "refuse_moved"]

# Fields of former releases, and the settings that replace them.
_MOVED: dict[str, dict[str, str]] = {
    "model": {
        "cut": "method.cut",
        "tail_blocks": "method.tail_blocks",
        "keep_tokens": "method.keep_tokens",
        "prompt_at": 'method.name = "sfprompt" (prompt_at = "cut") or "sfprompt-paper" ("input")',
        "prompt_depth": "method.prompt_depth",
        "prompt_count": "method.prompt_count",
        "prompt_init": "method.prompt_init",
        "tune": 'method.name = "fedpeft", "fedavg" or "splitfed", with method.tune',
        "adapter_width": 'method.adapter_width of method.name = "fedpeft"',
        "tune_body": 'method.tune = "full" of method.name = "splitfed"',
        "lora_rank": 'method.lora_rank of method.name = "fedpft" or "offsite-tuning"',
        "lora_ends": 'method.ends of method.name = "offsite-tuning"',
        "proxy": 'method.name = "fedpft" (pruned) or "offsite-tuning" (dropped)',
        "proxy_ends": "method.ends",
        "proxy_width": 'method.width of method.name = "fedpft"',
        "proxy_blocks": 'method.blocks of method.name = "offsite-tuning"',
        "local_body": 'method.local_body of method.name = "sfprompt-paper"',
    },
    "training": {
        "keep_fraction": "method.keep_fraction",
        "pruning": "method.pruning",
        "prune_per_class": "method.prune_per_class",
        "local_epochs": "method.local_epochs",
        "split_epochs": "method.split_epochs",
        "local_learning_rate_scale": "method.local_learning_rate_scale",
    },
    "wire": {
        "keep_smashed": "method.keep_smashed",
        "delta_smashed": 'method.delta_smashed of method.name = "sfprompt-paper"',
        "skip_below": 'method.skip_below of method.name = "sfprompt-paper"',
        "gradient_correction": 'method.gradient_correction of method.name = "sfprompt-paper"',
    },
}


class RunSettings(Message):
    """All settings of a run. Equal settings and data give equal results."""

    name: Text = Field("run", description="the run's name")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random choices of the run")
    class_names: tuple[ClassName, ...] | None = Field(
        None, description="names of the classes, in the order of the labels"
    )
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(parse_method)] = Field(
        default_factory=lambda: parse_method({}), description="the method's name and settings"
    )
    model: BackboneSettings = Field(BackboneSettings(), description="the pretrained model")
    federation: FederationSettings = Field(
        FederationSettings(), description="rounds, participants, averaging and privacy"
    )
    training: TrainingSettings = Field(
        TrainingSettings(), description="optimisation of the tuned parameters"
    )
    wire: WireSettings = Field(WireSettings(), description="codecs of the tensors on the wire")

    @model_validator(mode="before")
    @classmethod
    def _fill_method_defaults(cls, values: Any) -> Any:
        """Parse the method first, since it has defaults for the other tables."""
        if not isinstance(values, Mapping):
            return values
        refuse_moved(values)
        try:
            method = parse_method(values.get("method", {}))
        except ValueError:
            return values  # the field's validation reports the error
        filled = {**values, "method": method}
        for name, defaults in method.defaults(values).items():
            table = values.get(name, {})
            if isinstance(table, Mapping):
                filled[name] = {**defaults, **table}
        return filled

    @model_validator(mode="after")
    def _check_method(self) -> RunSettings:
        self.method.check(self)
        return self

    def __copy__(self) -> Self:
        # `model_copy` may change fields of the copy, so that a cached plan would be wrong.
        copied = super().__copy__()
        copied.__dict__.pop("plan", None)
        return copied

    @cached_property
    def plan(self) -> RunPlan:
        """The plan that server and devices execute. May import torch for the backbone's shape.

        Raises:
            InvalidField: the backbone does not fit the method.
        """
        return self.method.build_plan(self)


def refuse_moved(values: Mapping[str, Any]) -> None:
    """Refuse fields of former releases.

    Args:
        values: unvalidated values of `RunSettings`, by table.

    Raises:
        ValueError: names the field and its new place.
    """
    for part, moved in _MOVED.items():
        given = values.get(part)
        for field in given if isinstance(given, Mapping) else ():
            if field in moved:
                raise ValueError(f"{part}.{field} has moved: write {moved[field]}")
    if "distillation" in values:
        raise ValueError("distillation has moved: write method.distillation")
