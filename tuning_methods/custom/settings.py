"""Settings of a method that is put together by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from protocol.method import Fields, MethodSettings, load_class, method_class
from protocol.plan import RunPlan

if TYPE_CHECKING:
    from protocol.settings import RunSettings

_PARTS = ("model", "training", "wire")


class Custom(MethodSettings):
    """Fields of a plan as they are, for research on combinations that no other method has."""

    name: Literal["custom"] = "custom"

    model: dict[str, Any] = Field({}, description="fields of `ModelPlan`")
    training: dict[str, Any] = Field({}, description="fields of `TrainingPlan`")
    wire: dict[str, Any] = Field({}, description="fields of `WirePlan`")
    distillation: dict[str, Any] = Field({}, description="of a proxy or a local body")

    @classmethod
    def of(cls, plan: RunPlan) -> RunSettings:
        """The settings that give exactly this plan."""
        from protocol.settings import RunSettings

        values = plan.model_dump(mode="json")
        method: dict[str, Any] = {"name": "custom", "distillation": values.pop("distillation")}
        for part in _PARTS:
            known = RunSettings.model_fields[part].annotation.model_fields  # type: ignore[union-attr]
            method[part] = {k: values[part].pop(k) for k in list(values[part]) if k not in known}
        return RunSettings.model_validate({**values, "method": method})

    @property
    def renews_head(self) -> bool:
        return bool(self.distillation.get("every"))

    def side(self, name: str) -> type[Any]:
        return load_class(getattr(method_class(self._like()), name))

    def _like(self) -> str:
        """The method whose code the mechanisms of this plan need."""
        if self.model.get("tune_body"):
            return "splitfed"
        if self.model.get("proxy", "none") != "none":
            return "fedpft"
        return "sfprompt-paper"

    def check(self, settings: RunSettings) -> None:
        super().check(settings)
        if self._like() != "sfprompt-paper" and self.wire.get("delta_smashed") is not None:
            raise ValueError("delta_smashed needs proxy = none: no method has both")

    def model_part(self, settings: RunSettings) -> Fields:
        return self.model

    def training_part(self) -> Fields:
        return self.training

    def wire_part(self) -> Fields:
        return self.wire

    def plan_part(self) -> Fields:
        return {"distillation": self.distillation} if self.distillation else {}
