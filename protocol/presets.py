"""The forms of SFPrompt: as this project runs it by default, and as it was published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = ["FORMS", "Form", "over_form"]

Form = Literal["default", "paper"]

FORMS: tuple[Form, ...] = get_args(Form)

_METHODS = {"default": "sfprompt", "paper": "sfprompt-paper"}


def over_form(form: Form, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `RunSettings`, with the form's method unless they name one.

    Args:
        form: of SFPrompt.
        values: of `RunSettings`, by part; neither validated nor changed here.
    """
    method = values.get("method", {})
    if not isinstance(method, Mapping):
        return dict(values)  # the settings' own validation refuses it
    return {**values, "method": {"name": _METHODS[form], **method}}
