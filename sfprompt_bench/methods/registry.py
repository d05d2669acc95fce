"""All methods by name. A new one is a class in this folder and an entry in `_CLASSES`."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.errors import NotFound
from sfprompt_bench.methods.base import FederatedMethod, Method
from sfprompt_bench.methods.closed_form import LDADepths, LDAProbe, RidgeDepths, RidgeProbe
from sfprompt_bench.methods.fed3r import Fed3R
from sfprompt_bench.methods.pooled import Central, CentralPaper, LinearProbe
from sfprompt_bench.methods.proxied import FedPft, OffsiteTuning
from sfprompt_bench.methods.sfprompt import (
    SFPrompt,
    SFPromptCutDeep,
    SFPromptCutShallow,
    SFPromptInputDeep,
    SFPromptInputShallow,
    SFPromptPaper,
    SFPromptPaperProxy,
)
from sfprompt_bench.methods.splitfed import SplitFedFull, SplitFedLinear
from sfprompt_bench.methods.whole_model import (
    FedPeftAdapter,
    FedPeftBias,
    FedPeftHead,
    FedPeftPrompt,
    FullFineTuning,
)

_CLASSES: tuple[type[Method], ...] = (
    FullFineTuning,
    FedPeftHead,
    FedPeftBias,
    FedPeftAdapter,
    FedPeftPrompt,
    Fed3R,
    FedPft,
    OffsiteTuning,
    SplitFedFull,
    SplitFedLinear,
    SFPromptPaper,
    SFPromptPaperProxy,
    SFPromptInputShallow,
    SFPromptInputDeep,
    SFPromptCutShallow,
    SFPromptCutDeep,
    SFPrompt,
    Central,
    CentralPaper,
    LinearProbe,
    RidgeProbe,
    LDAProbe,
    RidgeDepths,
    LDADepths,
)

# In the order of tables: the whole model on the device, split methods, references.
METHODS: dict[str, Method] = {method.name: method() for method in _CLASSES}

# The rows of a cost estimate.
ESTIMATED: dict[str, FederatedMethod] = {
    name: method
    for name, method in METHODS.items()
    if isinstance(method, FederatedMethod) and not method.is_variant
}


def get_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        NotFound: there is no such method.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise NotFound(
            "there is no such method", field="methods", limit=sorted(METHODS), value=name
        ) from None


def settable_fields(names: Iterable[str]) -> set[str]:
    """The fields of `[method]` that one of these methods has and does not fix.

    Raises:
        NotFound: there is no such method.
    """
    return set().union(*(get_method(name).fields for name in names))
