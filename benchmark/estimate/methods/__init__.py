"""The methods, each in a file of its own. A new one is a class there and a name here."""

from benchmark.estimate.methods.fedpeft_adapter import FedPeftAdapter
from benchmark.estimate.methods.fedpeft_bias import FedPeftBias
from benchmark.estimate.methods.fedpeft_head import FedPeftHead
from benchmark.estimate.methods.fedpeft_prompt import FedPeftPrompt
from benchmark.estimate.methods.fedpft import FedPft
from benchmark.estimate.methods.fl_full import FullFineTuning
from benchmark.estimate.methods.method import Method
from benchmark.estimate.methods.offsite_tuning import OffsiteTuning
from benchmark.estimate.methods.sfprompt import SFPrompt
from benchmark.estimate.methods.sfprompt_paper import SFPromptPaper
from benchmark.estimate.methods.splitfed_full import SplitFedFull
from benchmark.estimate.methods.splitfed_linear import SplitFedLinear

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
