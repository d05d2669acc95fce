"""Tuning on one heap of data: the ceiling."""

from __future__ import annotations

from edge_client.data import Dataset
from protocol.distillation import DistillationSettings
from protocol.federation import FederationSettings
from protocol.plan import RunPlan, TrainingPlan, WirePlan
from sfprompt_bench.compare.methods.base import Advance, Measured, Reference, changed


class Central(Reference):
    """The prompts and tail of `sfprompt`, tuned in one process that has all the data."""

    name = "central"
    what = "the ceiling: the prompts and tail of sfprompt, tuned on one heap of data"

    def settings(self, base: RunPlan) -> RunPlan:
        # There is nobody to protect here, and nothing to tell of a sweep over how.
        private = {"dp_clip": None, "dp_noise_multiplier": 0.0, "dp_seed": None}
        federation = {"min_participants": 1, "evaluate_every": 0, **private}
        return changed(
            base,
            {
                "wire": WirePlan().model_dump(),
                "federation": federation,
                "training": {"pruning": "random", "prune_per_class": False},
            },
        )

    def measure(self, settings: RunPlan, data: Dataset, advance: Advance) -> Measured:
        # Here, as scikit-learn takes seconds that no other method should wait for.
        from sfprompt_bench.compare.references import Centralised

        model = Centralised(settings, data)
        return Measured(model.tune(advance), model.trainable_parameters)


class CentralPaper(Central):
    """The prompts and tail of `sfprompt-paper`, tuned in one process that has all the data."""

    name = "central-paper"
    what = "the prompts and tail of sfprompt-paper, tuned on one heap of data"
    form = "paper"


class LinearProbe(Reference):
    """Logistic regression on the frozen features, the best of four strengths."""

    name = "linear-probe"
    what = "the floor: logistic regression on frozen features of one heap of data"

    def settings(self, base: RunPlan) -> RunPlan:
        unprompted = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        # What the probe does not know of is set back, so that a sweep over it probes once.
        return changed(
            base,
            {
                "model": {**unprompted, "cut": 0, "tail_blocks": 0, "keep_tokens": 0},
                "federation": FederationSettings(rounds=1).model_dump(),
                "training": TrainingPlan().model_dump(),
                "wire": WirePlan().model_dump(),
                "distillation": DistillationSettings().model_dump(),
            },
        )

    def measure(self, settings: RunPlan, data: Dataset, advance: Advance) -> Measured:
        # Here, as scikit-learn takes seconds that no other method should wait for.
        from sfprompt_bench.compare.references import Centralised

        model = Centralised(settings, data)
        weights = settings.model.num_classes * (model.tail.sizes.width + 1)
        return Measured(model.probe(), weights)
