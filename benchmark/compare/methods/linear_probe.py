"""A linear probe: the floor."""

from __future__ import annotations

from benchmark.compare.methods.method import Advance, Measured, Reference, changed
from edge_client.data import Dataset
from protocol.settings import (
    DistillationSettings,
    FederationSettings,
    RunSettings,
    TrainingSettings,
    WireSettings,
)


class LinearProbe(Reference):
    """Logistic regression on the frozen features, the best of four strengths."""

    name = "linear-probe"
    what = "the floor: logistic regression on frozen features of one heap of data"

    def settings(self, base: RunSettings) -> RunSettings:
        unprompted = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        # What the probe does not know of is set back, so that a sweep over it probes once.
        return changed(
            base,
            {
                "model": {**unprompted, "cut": 0, "tail_blocks": 0, "keep_tokens": 0},
                "federation": FederationSettings(rounds=1).model_dump(),
                "training": TrainingSettings().model_dump(),
                "wire": WireSettings().model_dump(),
                "distillation": DistillationSettings().model_dump(),
            },
        )

    def measure(self, settings: RunSettings, data: Dataset, advance: Advance) -> Measured:
        # Here, as scikit-learn takes seconds that no other method should wait for.
        from benchmark.centralised import Centralised

        model = Centralised(settings, data)
        weights = settings.model.num_classes * (model.tail.sizes.width + 1)
        return Measured(model.probe(), weights)
