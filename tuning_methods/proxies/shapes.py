"""What shapes of proxies have in common: the backbone's MLPs, its ends, evenly spaced blocks."""

from __future__ import annotations

from protocol.errors import FieldValue, InvalidField
from protocol.parts import BackboneSettings
from tuning_methods.whole_model import anatomy_of


def backbone_widths(model: BackboneSettings) -> tuple[int, ...]:
    """Return the number of neurons in the MLP of each of a backbone's blocks.

    Raises:
        InvalidField: timm has no such architecture, it cannot be cut, or it has no proxy.
    """
    if widths := anatomy_of(model).mlp_widths:
        return widths
    from split_model.errors import ModelPlanError

    limit = "a plain vision transformer: only of its blocks a proxy is made"
    raise ModelPlanError("backbone", limit, model.backbone)


def misfit(field: str, limit: str, value: FieldValue) -> InvalidField:
    """Return the error for a setting of the method that does not fit the backbone."""
    return InvalidField(
        "the method's settings do not fit the backbone",
        field=f"method.{field}",
        limit=limit,
        value=value,
    )


def check_ends(ends: int, depth: int) -> None:
    """Check that ``ends`` blocks at either end of a backbone of ``depth`` blocks do not overlap.

    Raises:
        InvalidField: they do.
    """
    if 2 * ends > depth:
        raise misfit("ends", f"at most half of the backbone's {depth} blocks", ends)


def evenly(blocks: range, count: int) -> list[int]:
    """Choose ``count`` evenly spaced blocks: the middle block of each of ``count`` equal shares."""
    return [blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)]
