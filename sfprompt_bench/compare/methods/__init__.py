"""The methods, each in a file of its own. A new one is a class there and a name here."""

from protocol.errors import NotFound
from sfprompt_bench.compare.methods.base import Measured, Method, Reference, changed
from sfprompt_bench.compare.methods.federated import (
    FedPeftAdapter,
    FedPeftBias,
    FedPeftHead,
    FedPeftPrompt,
    FedPft,
    FullFineTuning,
    OffsiteTuning,
)
from sfprompt_bench.compare.methods.pooled import Central, CentralPaper, LinearProbe
from sfprompt_bench.compare.methods.split import (
    SFPrompt,
    SFPromptCutShallow,
    SFPromptInputDeep,
    SFPromptInputShallow,
    SFPromptPaper,
    SFPromptPaperProxy,
    SplitFedFull,
    SplitFedLinear,
)

_CLASSES: tuple[type[Method], ...] = (
    FullFineTuning,
    FedPeftHead,
    FedPeftBias,
    FedPeftAdapter,
    FedPeftPrompt,
    SplitFedFull,
    FedPft,
    OffsiteTuning,
    SplitFedLinear,
    SFPromptPaper,
    SFPromptPaperProxy,
    SFPromptInputShallow,
    SFPromptInputDeep,
    SFPromptCutShallow,
    SFPrompt,
    Central,
    CentralPaper,
    LinearProbe,
)

# In the order of tables: the whole model on the device, split, and what they are held against.
METHODS: dict[str, Method] = {method.name: method() for method in _CLASSES}


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        NotFound: there is none.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise NotFound(
            "there is no such method", field="methods", limit=sorted(METHODS), value=name
        ) from None


__all__ = ["METHODS", "Measured", "Method", "Reference", "changed", "method_named"]
