"""Tuning on one heap of data: the ceiling."""

from __future__ import annotations

from benchmark.compare.methods.method import Advance, Measured, Reference, changed
from edge_client.data import Dataset
from protocol.settings import RunSettings, WireSettings


class Central(Reference):
    """The prompts and tail of `sfprompt`, tuned in one process that has all the data."""

    name = "central"
    what = "the ceiling: the prompts and tail of sfprompt, tuned on one heap of data"

    def settings(self, base: RunSettings) -> RunSettings:
        # There is nobody to protect here, and nothing to tell of a sweep over how.
        private = {"dp_clip": None, "dp_noise_multiplier": 0.0, "dp_seed": None}
        federation = {"min_participants": 1, "evaluate_every": 0, **private}
        return changed(
            base,
            {
                "wire": WireSettings().model_dump(),
                "federation": federation,
                "training": {"pruning": "random", "prune_per_class": False},
            },
        )

    def measure(self, settings: RunSettings, data: Dataset, advance: Advance) -> Measured:
        # Here, as scikit-learn takes seconds that no other method should wait for.
        from benchmark.centralised import Centralised

        model = Centralised(settings, data)
        return Measured(model.tune(advance), model.trainable_parameters)
