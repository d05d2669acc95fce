"""SFPrompt as this project runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from protocol.plan import RunPlan, WirePlan
from protocol.presets import Form
from sfprompt_bench.compare.methods.base import Changes, Method, changed


class SFPrompt(Method):
    """Prompts ahead of every block of the body, kept and tuned by the server."""

    name = "sfprompt"
    what = "SFPrompt, default preset: prompts in every block of the body, kept by the server"
    costed_as = "sfprompt"

    def settings(self, base: RunPlan) -> RunPlan:
        return changed(base, {"model": {"prompt_at": "cut", "prompt_depth": "deep"}})


class SplitFed(Method):
    """SplitFed (arXiv 2004.12088) in U-shape, in float32.

    The paper's form of SFPrompt with no prompts, all samples and no local update.

    Attributes:
        tuned: what of the model is tuned, as settings of the model.
    """

    form: ClassVar[Form] = "paper"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8}}
    tuned: ClassVar[Mapping[str, Any]]

    def settings(self, base: RunPlan) -> RunPlan:
        unprompted = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        return changed(
            base,
            {
                "model": {**unprompted, **self.tuned},
                "training": {"keep_fraction": 1.0, "pruning": "random", "local_epochs": 0},
                "wire": WirePlan().model_dump(),
            },
        )


class SplitFedFull(SplitFed):
    """Nothing is frozen.

    Each participant has a body of its own on the server during a round; at its end the bodies are
    averaged as heads and tails are.
    """

    name = "splitfed-full"
    what = "U-shaped SplitFed: head, body and tail are trained, all are averaged, float32"
    costed_as = "splitfed-full"
    # As full fine-tuning.
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 5e-5}}
    tuned: ClassVar[Mapping[str, Any]] = {"tune": "full", "tune_body": True}


class SplitFedLinear(SplitFed):
    """Head and body are frozen, and the tail's last layer is tuned."""

    name = "splitfed-linear"
    what = "U-shaped SplitFed with frozen head and body: the tail alone is tuned, float32"
    costed_as = "splitfed-linear"
    tuned: ClassVar[Mapping[str, Any]] = {"tune": "classifier"}


class SFPromptCutShallow(Method):
    """The default preset with one set of prompts, ahead of the first block of the body."""

    name = "sfprompt-cut-shallow"
    what = "the default preset with prompts ahead of the body's first block only"
    costed_as = "sfprompt"

    def settings(self, base: RunPlan) -> RunPlan:
        return changed(base, {"model": {"prompt_at": "cut", "prompt_depth": "shallow"}})


class SFPromptInputShallow(Method):
    """The paper's placement and recipe, with the codecs of the default preset where they apply."""

    name = "sfprompt-input-shallow"
    what = "the paper's placement and recipe in 8 bits, features only as far as the tail reads"
    form: ClassVar[Form] = "paper"
    recipe: ClassVar[Changes] = {
        "wire": {
            "smashed": "int8",
            "features": "int8",
            "gradients": "int8",
            "inference": "float16",
            "updates": "float16",
            "update_deltas": True,
            "head": "int8",
            "pooled_features": True,
        }
    }
    costed_as: ClassVar[str | None] = "sfprompt"

    def settings(self, base: RunPlan) -> RunPlan:
        return changed(base, {"model": {"prompt_at": "input", "prompt_depth": "shallow"}})


class SFPromptInputDeep(SFPromptInputShallow):
    """Refused, by the name of the setting, wherever a cut backbone has no deep prompts there."""

    name = "sfprompt-input-deep"
    what = "the same with prompts ahead of every block that the device holds"
    costed_as = None

    def settings(self, base: RunPlan) -> RunPlan:
        return changed(base, {"model": {"prompt_at": "input", "prompt_depth": "deep"}})


class SFPromptPaper(Method):
    """SFPrompt (arXiv 2407.17533, section 3): prompts at the input, everything in float32."""

    name = "sfprompt-paper"
    what = "SFPrompt as published: prompts at the input, four tensors a step, float32"
    form: ClassVar[Form] = "paper"
    costed_as = "sfprompt-paper"

    def settings(self, base: RunPlan) -> RunPlan:
        plain = WirePlan().model_dump()
        return changed(
            base, {"model": {"prompt_at": "input", "prompt_depth": "shallow"}, "wire": plain}
        )


class SFPromptPaperProxy(SFPromptPaper):
    """The paper's form, local updates through two blocks that are distilled from the body's."""

    name = "sfprompt-paper-proxy"
    what = "SFPrompt as published, local updates through a small body that the server distils"
    recipe: ClassVar[Changes] = {"model": {"local_body": 2}, "distillation": {"epochs": 5}}
