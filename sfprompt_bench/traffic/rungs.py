"""The rungs of the ladder: the paper's form, and one more measure on each up to the default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from protocol.settings import RunSettings
from sfprompt_bench.methods.base import Changes, with_changes


@dataclass(frozen=True)
class Rung:
    """One measure, in addition to those before it.

    Attributes:
        name: short, for tables and plots.
        what: the measure in a sentence.
        settings: of the run on this rung.
    """

    name: str
    what: str
    settings: RunSettings


def ladder(paper: RunSettings, default: RunSettings) -> list[Rung]:
    """Make the rungs from the paper's form of a run to its default form.

    The first and the last are these two. A measure without effect between them has no rung.
    """
    rungs = [Rung("paper", "the paper's form: four tensors a step, all tokens, float32", paper)]
    for name, what, changes in _measures(default):
        settings = with_changes(rungs[-1].settings, changes)
        if settings != rungs[-1].settings:
            rungs.append(Rung(name, what, settings))
    rungs[-1] = replace(rungs[-1], what=f"{rungs[-1].what}: the default form")
    return rungs


def _measures(default: RunSettings) -> Iterator[tuple[str, str, Changes]]:
    """Name, description and changes of each measure, in the order of the ladder.

    The training settings change together with the method that they were tuned for, except the
    share of selected samples.
    """
    wire, training, values = default.wire, default.plan.training, default.model_dump()
    step_tensors = dict.fromkeys(("smashed", "features", "gradients"), "bfloat16")
    yield "bfloat16", "the tensors of a step in bfloat16", {"wire": step_tensors}
    yield (
        "lean features",
        "only the features that the tail reads",
        {"wire": {"pooled_features": wire.pooled_features}},
    )
    plain = {"keep_fraction": 1.0, "keep_smashed": False}
    yield (
        "at the cut",
        f"{default.plan.model.prompt_depth} prompts in the body, tuned there, with training "
        "settings for them; all samples, whose smashed data cross in every round",
        {"method": values["method"] | plain, "training": values["training"]},
    )
    yield (
        "kept",
        "a sample's smashed data sent once and kept by the server",
        {"method": {"keep_smashed": values["method"]["keep_smashed"]}},
    )
    yield (
        "coded smashed",
        f"smashed data in {wire.smashed}",
        {"wire": {"smashed": wire.smashed}},
    )
    fields = ("features", "gradients", "stochastic_rounding", "inference")
    yield (
        "coded steps",
        f"features in {wire.features}, gradients in {wire.gradients}",
        {"wire": {name: values["wire"][name] for name in fields}},
    )
    yield (
        "coded states",
        f"head in {wire.head}, updates in {wire.updates} as changes of the state",
        {"wire": values["wire"]},
    )
    yield (
        "fewer samples",
        f"in each round {training.keep_fraction:.0%} of the samples, pruned by {training.pruning}",
        {"method": values["method"]},
    )
