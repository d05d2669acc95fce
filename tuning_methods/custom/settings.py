"""Settings of a method that consists of a plan's fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from protocol.method import Fields, MethodSettings, load_class, method_class
from protocol.plan import RunPlan
from tuning_methods.proxies.settings import DistillationSettings
from tuning_methods.sfprompt.settings import PaperPart

if TYPE_CHECKING:
    from protocol.settings import RunSettings

_PARTS = ("model", "training", "wire")

# Fields that a method adds to the plan, and the table that has them.
OWN_FIELDS = {"local_body": "model", "delta_smashed": "wire", "skip_below": "wire"}


class Custom(MethodSettings):
    """A plan's fields, set one by one: for research on combinations that no other method has."""

    name: Literal["custom"] = "custom"

    model: dict[str, Any] = Field({}, description="fields of `ModelPlan`")
    training: dict[str, Any] = Field({}, description="fields of `TrainingPlan`")
    wire: dict[str, Any] = Field({}, description="fields of `WirePlan`")
    distillation: DistillationSettings = Field(
        DistillationSettings(), description="distillation of a proxy or a local body"
    )

    @classmethod
    def of(cls, plan: RunPlan) -> RunSettings:
        """Return the settings that result in exactly this plan."""
        from protocol.settings import RunSettings

        values = plan.model_dump(mode="json")
        own: dict[str, Any] = values.pop("method")
        method: dict[str, Any] = {"name": "custom"}
        for part in _PARTS:
            known = RunSettings.model_fields[part].annotation.model_fields  # type: ignore[union-attr]
            extra = [name for name in values[part] if name not in known]
            method[part] = {name: values[part].pop(name) for name in extra}
        for name, value in own.items():
            (method[OWN_FIELDS[name]] if name in OWN_FIELDS else method)[name] = value
        return RunSettings.model_validate({**values, "method": method})

    @property
    def rebuilds_head(self) -> bool:
        return self.distillation.every > 0

    def load_side(self, name: str) -> type[Any]:
        return load_class(getattr(method_class(self._choose_method()), name))

    def _choose_method(self) -> str:
        """Return the name of the method whose code this plan needs."""
        if self.model.get("tune_body"):
            return "splitfed"
        if self.model.get("blocks") or self.model.get("mlp_widths"):
            return "fedpft"
        return "sfprompt-paper"

    def check(self, settings: RunSettings) -> None:
        plan, chosen = self.build_plan(settings), method_class(self._choose_method())
        for field in plan.method:
            if field not in chosen.model_fields:
                name = chosen.model_fields["name"].default
                raise ValueError(f"{field} does not go with the fields that need method {name}")
        chosen.check_plan(plan)

    def locate(self, part: str, field: str) -> str:
        part = OWN_FIELDS.get(field, part)
        inside = field in getattr(self, part, {})
        return f"method.{part}.{field}" if inside else super().locate(part, field)

    def model_part(self, settings: RunSettings) -> Fields:
        return _without_own(self.model)

    def training_part(self, settings: RunSettings) -> Fields:
        return self.training

    def wire_part(self) -> Fields:
        return _without_own(self.wire)

    def own_part(self) -> PaperPart:
        own = {name: getattr(self, part).get(name) for name, part in OWN_FIELDS.items()}
        given = {name: value for name, value in own.items() if value is not None}
        return self.validate_part(PaperPart, "method", given | {"distillation": self.distillation})


def _without_own(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name not in OWN_FIELDS}
