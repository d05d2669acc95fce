"""What is changed from rung to rung."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmark.compare.methods import changed
from benchmark.compare.methods.method import Changes
from protocol.settings import RunSettings


@dataclass(frozen=True)
class Rung:
    """One measure, on top of those before it.

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

    The first and the last are these two, untouched. A measure that changes nothing between them
    has no rung.
    """
    rungs = [Rung("paper", "the paper's form: four tensors a step, all tokens, float32", paper)]
    for name, what, changes in _measures(default):
        settings = changed(rungs[-1].settings, changes)
        if settings != rungs[-1].settings:
            rungs.append(Rung(name, what, settings))
    rungs[-1] = replace(rungs[-1], what=f"{rungs[-1].what}: the default form")
    return rungs


def _measures(default: RunSettings) -> Iterator[tuple[str, str, Changes]]:
    """Name, description and change of each, in the order in which they are taken up.

    The recipe of training goes with the place of the prompts that it was found for, but for the
    share of samples that it keeps.
    """
    wire, training, last = default.wire, default.training, default.model_dump()
    half = dict.fromkeys(("smashed", "features", "gradients"), "bfloat16")
    yield "bfloat16", "what crosses in a step in bfloat16", {"wire": half}
    yield (
        "lean features",
        "features only as far as the tail reads them",
        {"wire": {"pooled_features": wire.pooled_features}},
    )
    all_samples = {"keep_fraction": 1.0}
    yield (
        "at the cut",
        f"{default.model.prompt_depth} prompts in the body, tuned there, with their own recipe; "
        "all samples, whose smashed data cross in every round",
        {"model": last["model"], "training": last["training"] | all_samples},
    )
    yield (
        "kept",
        "a sample's smashed data sent once and kept by the server",
        {"wire": {"keep_smashed": wire.keep_smashed}},
    )
    yield (
        "coded smashed",
        f"smashed data in {wire.smashed}",
        {"wire": {"smashed": wire.smashed}},
    )
    steps = ("features", "gradients", "stochastic_rounding", "inference")
    yield (
        "coded steps",
        f"features in {wire.features}, gradients in {wire.gradients}",
        {"wire": {name: last["wire"][name] for name in steps}},
    )
    yield (
        "coded states",
        f"head in {wire.head}, updates in {wire.updates} as changes of the state",
        {"wire": last["wire"]},
    )
    yield (
        "fewer samples",
        f"in each round {training.keep_fraction:.0%} of the samples, pruned by {training.pruning}",
        {"training": last["training"]},
    )
