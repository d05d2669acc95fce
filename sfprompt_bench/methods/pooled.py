"""References on the pooled data of all devices: the ceiling and the floor of a comparison."""

from __future__ import annotations

from edge_client.data import Dataset
from protocol.distillation import DistillationSettings
from protocol.federation import FederationSettings
from protocol.plan import RunPlan, TrainingPlan, WirePlan
from sfprompt_bench.methods.base import Advance, Reference, ReferenceResult, with_changes


class Central(Reference):
    """The prompts and tail of `sfprompt`, tuned in one process on the pooled data."""

    name = "central"
    what = "the ceiling: the prompts and tail of sfprompt, tuned on the pooled data"

    def settings(self, base: RunPlan) -> RunPlan:
        # Settings without effect here are reset, so that a sweep over them tunes once.
        private = {"dp_clip": None, "dp_noise_multiplier": 0.0, "dp_seed": None}
        return with_changes(
            base,
            {
                "wire": WirePlan().model_dump(),
                "federation": {"min_participants": 1, "evaluate_every": 0, **private},
                "training": {"pruning": "random", "prune_per_class": False},
            },
        )

    def measure(self, settings: RunPlan, data: Dataset, advance: Advance) -> ReferenceResult:
        # scikit-learn takes seconds to import, which no other method should wait for.
        from sfprompt_bench.methods.pooled_model import PooledModel

        model = PooledModel(settings, data)
        return ReferenceResult(model.tune(advance), model.trainable_parameters)


class CentralPaper(Central):
    """The prompts and tail of `sfprompt-paper`, tuned in one process on the pooled data."""

    name = "central-paper"
    what = "the prompts and tail of sfprompt-paper, tuned on the pooled data"
    form = "paper"


class LinearProbe(Reference):
    """Logistic regression on the frozen features, the best of four strengths."""

    name = "linear-probe"
    what = "the floor: logistic regression on frozen features of the pooled data"

    def settings(self, base: RunPlan) -> RunPlan:
        unprompted = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        # Settings without effect here are reset, so that a sweep over them probes once.
        return with_changes(
            base,
            {
                "model": {**unprompted, "cut": 0, "tail_blocks": 0, "keep_tokens": 0},
                "federation": FederationSettings(rounds=1).model_dump(),
                "training": TrainingPlan().model_dump(),
                "wire": WirePlan().model_dump(),
                "distillation": DistillationSettings().model_dump(),
            },
        )

    def measure(self, settings: RunPlan, data: Dataset, advance: Advance) -> ReferenceResult:
        # scikit-learn takes seconds to import, which no other method should wait for.
        from sfprompt_bench.methods.pooled_model import PooledModel

        model = PooledModel(settings, data)
        weights = settings.model.num_classes * (model.tail.sizes.width + 1)
        return ReferenceResult(model.probe(), weights)
