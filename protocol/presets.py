"""The forms of SFPrompt: this project's default, and the published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = ["FORMS", "Form", "over_form"]

Form = Literal["default", "paper"]

FORMS: tuple[Form, ...] = get_args(Form)

_METHODS = {"default": "sfprompt", "paper": "sfprompt-paper"}


def over_form(form: Form, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the method of a form, unless they name a method.

    Args:
        form: the form of SFPrompt.
        values: unvalidated values of `RunSettings`, by table; not changed.
    """
    method = values.get("method", {})
    if not isinstance(method, Mapping):
        return dict(values)  # `RunSettings` refuses it
    return {**values, "method": {"name": _METHODS[form], **method}}
