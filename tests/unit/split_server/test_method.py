"""The server's side of a method, as it is without overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol.plan import ModelPlan, RunPlan
from split_model.backbone.weights import BackboneFile
from split_model.errors import ModelPlanError
from split_server.method import ServerMethod

BACKBONE = BackboneFile(path=Path("backbone"), sha256="", nbytes=0, parameters=0)


def test_the_weights_are_the_backbones() -> None:
    files = ServerMethod().prepare(RunPlan(), BACKBONE, Path())
    assert (files.weights, dict(files.extras)) == (BACKBONE.path, {})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("blocks", {"blocks": (0, 2)}),
        ("blocks", {"blocks": (0, 2), "mlp_widths": (0, 8)}),
        ("mlp_widths", {"mlp_widths": (8, 8)}),
    ],
)
def test_the_backbones_weights_are_refused_for_other_blocks(
    field: str, changes: dict[str, Any]
) -> None:
    plan = RunPlan(model=ModelPlan(**changes))
    with pytest.raises(ModelPlanError, match="makes no weights") as caught:
        ServerMethod().prepare(plan, BACKBONE, Path())
    assert caught.value.field == f"model.{field}"
    assert caught.value.value == list(changes[field])
