"""The methods, each in a file of its own. A new one is a class there and a name here."""

from benchmark.compare.methods.central import Central
from benchmark.compare.methods.central_paper import CentralPaper
from benchmark.compare.methods.fedpeft_adapter import FedPeftAdapter
from benchmark.compare.methods.fedpeft_bias import FedPeftBias
from benchmark.compare.methods.fedpeft_head import FedPeftHead
from benchmark.compare.methods.fedpeft_prompt import FedPeftPrompt
from benchmark.compare.methods.fedpft import FedPft
from benchmark.compare.methods.fl_full import FullFineTuning
from benchmark.compare.methods.linear_probe import LinearProbe
from benchmark.compare.methods.method import Measured, Method, Reference, changed
from benchmark.compare.methods.offsite_tuning import OffsiteTuning
from benchmark.compare.methods.sfprompt import SFPrompt
from benchmark.compare.methods.sfprompt_cut_shallow import SFPromptCutShallow
from benchmark.compare.methods.sfprompt_input_deep import SFPromptInputDeep
from benchmark.compare.methods.sfprompt_input_shallow import SFPromptInputShallow
from benchmark.compare.methods.sfprompt_paper import SFPromptPaper
from benchmark.compare.methods.sfprompt_paper_proxy import SFPromptPaperProxy
from benchmark.compare.methods.splitfed_full import SplitFedFull
from benchmark.compare.methods.splitfed_linear import SplitFedLinear
from protocol.errors import NotFound

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
