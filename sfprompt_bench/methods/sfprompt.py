"""SFPrompt: this project's default form, the published form, and placements between them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from protocol.plan import WirePlan
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.methods.base import FLOAT32, FederatedMethod
from sfprompt_bench.methods.sfprompt_cost import sfprompt_cost
from sfprompt_bench.presets import Changes


class SFPrompt(FederatedMethod):
    """A classifier of several depths: fitted in closed form, moved by a step in each round."""

    name = "sfprompt"
    what = "SFPrompt, default preset: a classifier in closed form, refined on the devices"
    tuning = "sfprompt"
    fixed: ClassVar[Changes] = {"method": {"prompt_depth": "deep"}}

    def cost(self, question: Question) -> MethodCost:
        """Calculate with the run's own placement, codecs and switches."""
        return sfprompt_cost(question)


class SFPromptCutDeep(SFPrompt):
    """The default preset with prompts before every block of the body, tuned after round 0."""

    name = "sfprompt-cut-deep"
    what = "the default preset with prompts before every block of the body"
    is_variant = True
    fixed: ClassVar[Changes] = {"method": {"prompt_depth": "deep", "split_epochs": 1}}


class SFPromptCutShallow(SFPrompt):
    """The default preset with one set of prompts, before the first block of the body."""

    name = "sfprompt-cut-shallow"
    what = "the default preset with prompts before the body's first block only"
    is_variant = True
    fixed: ClassVar[Changes] = {"method": {"prompt_depth": "shallow", "split_epochs": 1}}


class SFPromptInputShallow(SFPrompt):
    """The paper's placement and recipe, with the codecs of the default preset where they apply."""

    name = "sfprompt-input-shallow"
    what = "the paper's placement and recipe in 8 bits, only the features that the tail reads"
    is_variant = True
    tuning = "sfprompt-paper"
    defaults: ClassVar[Changes] = {
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
    fixed: ClassVar[Changes] = {"method": {"prompt_depth": "shallow"}}


class SFPromptInputDeep(SFPromptInputShallow):
    """Refused, with the setting's name, if the cut backbone supports no deep prompts there."""

    name = "sfprompt-input-deep"
    what = "the same with prompts before every block on the device"
    fixed: ClassVar[Changes] = {"method": {"prompt_depth": "deep"}}


class SFPromptPaper(FederatedMethod):
    """SFPrompt (arXiv 2407.17533, section 3): prompts at the input, everything in float32.

    All tokens cross in both directions on every visit. To start, head, tail and prompts; a round,
    2(|tail| + |prompts|) + 4 q E D for E split epochs of D selected samples, q = 4 · tokens ·
    width with prompts. The paper's formula has no evaluation, so that it is left out here.

    Operations of a round: head and tail forward for each scored sample, without prompts; for each
    visit of local update and split training the head forward, the gradient of its blocks' inputs
    (1x), and three times the tail.
    """

    name = "sfprompt-paper"
    what = "SFPrompt as published: prompts at the input, four tensors a step, float32"
    tuning = "sfprompt-paper"
    fixed: ClassVar[Changes] = {
        "method": {
            "prompt_depth": "shallow",
            "delta_smashed": None,
            "skip_below": 0,
            "gradient_correction": 0,
        },
        "wire": FLOAT32,
    }

    def cost(self, question: Question) -> MethodCost:
        run = question.plan
        placement = {"prompt_at": "input", "prompt_depth": "shallow", "keep_tokens": 0}
        published = run.model_copy(
            update={
                "model": run.model.model_copy(update=placement),
                "federation": run.federation.model_copy(update={"evaluate_every": 0}),
                "wire": WirePlan(),
            }
        )
        return sfprompt_cost(dataclasses.replace(question, plan=published))


class SFPromptPaperProxy(SFPromptPaper):
    """The paper's form with local updates through two blocks distilled from the body's."""

    name = "sfprompt-paper-proxy"
    what = "SFPrompt as published, local updates through a small body that the server distils"
    is_variant = True
    defaults: ClassVar[Changes] = {"method": {"local_body": 2, "distillation": {"epochs": 5}}}
