"""What is changed from rung to rung."""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.compare.methods import changed
from protocol.settings import RunSettings


@dataclass(frozen=True)
class Rung:
    """One measure.

    Attributes:
        name: short, for tables and plots.
        what: what it does, in a sentence.
        settings: of the whole run on this rung.
    """

    name: str
    what: str
    settings: RunSettings


def ladder(paper: RunSettings, default: RunSettings) -> list[Rung]:
    """The rungs from the paper-faithful form of a run to its default form.

    The first and the last are these two, untouched. Those between take over part after part, the
    recipe of training together with the place of the prompts that it was found for.
    """
    wire = default.wire
    half = dict.fromkeys(("smashed", "features", "gradients"), "bfloat16")
    at_the_cut = {
        "model": default.model.model_dump(),
        "training": default.training.model_dump(),
        "wire": {"keep_smashed": True, "pooled_features": True},
    }
    lean = changed(paper, {"wire": half | {"pooled_features": True}})
    cut = changed(paper, at_the_cut)
    return [
        Rung("paper", "the paper's form: four tensors a step, all tokens, float32", paper),
        Rung("lean legs", "the same in bfloat16, features only as far as the tail reads", lean),
        Rung(
            "at the cut",
            "prompts in the body, tuned there, with a recipe of their own; smashed data sent once, "
            "all in float32",
            cut,
        ),
        Rung(
            "default",
            f"smashed data in {wire.smashed}, features in {wire.features}, gradients in "
            f"{wire.gradients}, head in {wire.head}, updates in {wire.updates}",
            default,
        ),
    ]
