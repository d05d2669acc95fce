"""The methods, each in a file of its own. A new one is a class there and a name here."""

from sfprompt_bench.estimate.methods.base import Method
from sfprompt_bench.estimate.methods.federated import (
    FedPeftAdapter,
    FedPeftBias,
    FedPeftHead,
    FedPeftPrompt,
    FedPft,
    FullFineTuning,
    OffsiteTuning,
)
from sfprompt_bench.estimate.methods.split import (
    SFPrompt,
    SFPromptPaper,
    SplitFedFull,
    SplitFedLinear,
)

_CLASSES: tuple[type[Method], ...] = (
    FullFineTuning,
    FedPeftHead,
    FedPeftBias,
    FedPeftAdapter,
    FedPeftPrompt,
    FedPft,
    OffsiteTuning,
    SplitFedFull,
    SplitFedLinear,
    SFPromptPaper,
    SFPrompt,
)

# In the order of tables: the whole model on the device, then split.
METHODS: dict[str, Method] = {method.name: method() for method in _CLASSES}

__all__ = ["METHODS", "Method"]
