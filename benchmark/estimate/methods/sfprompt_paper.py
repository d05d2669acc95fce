"""SFPrompt as its paper has it."""

from __future__ import annotations

import dataclasses

from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods.method import Method
from benchmark.estimate.methods.sfprompt import SFPrompt
from benchmark.estimate.question import Question
from protocol.settings import WireSettings


class SFPromptPaper(Method):
    """SFPrompt (arXiv 2407.17533, section 3): the run with prompts at the input, float32.

    All tokens cross in both directions on every visit. To start, head, tail and prompts; a round,
    2(|tail| + |prompts|) + 4 q E D for E split epochs of D kept samples, q = 4 · tokens · width
    with prompts. Evaluation is not in the paper's formula and left out here.

    Operations of a round: head and tail forward for each sample that is scored, without prompts;
    for each visit of local update and split training the head forward, the gradient of its
    blocks' inputs (1x), and three times the tail.
    """

    name = "sfprompt-paper"

    def cost(self, question: Question) -> MethodCost:
        run = question.settings
        placed = {"prompt_at": "input", "prompt_depth": "shallow", "keep_tokens": 0}
        model = run.model.model_copy(update=placed)
        federation = run.federation.model_copy(update={"evaluate_every": 0})
        plain = run.model_copy(
            update={"model": model, "federation": federation, "wire": WireSettings()}
        )
        return SFPrompt().cost(dataclasses.replace(question, settings=plain))
