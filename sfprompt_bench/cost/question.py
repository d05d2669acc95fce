"""The input of a cost calculation: a run, and one device's share of the data."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidField
from protocol.plan import ModelPlan, RunPlan
from pruning import selected_count


@dataclass(frozen=True)
class Question:
    """One device in one run. The cost does not depend on the hardware.

    Args:
        plan: of the run; each method reads the parts that apply to it.
        train_samples: training images of this device, at least 1.
        test_samples: images that it evaluates.
        local_epochs: passes over the samples in a round of a federated method, at least 1. Split
            methods read theirs from the plan.

    Raises:
        InvalidField: a number is below its limit.
    """

    plan: RunPlan
    train_samples: int
    test_samples: int = 0
    local_epochs: int = 10

    def __post_init__(self) -> None:
        for field, limit in (("train_samples", 1), ("test_samples", 0), ("local_epochs", 1)):
            value = getattr(self, field)
            if value < limit:
                raise InvalidField(
                    f"{field} must be at least {limit}", field=field, limit=limit, value=value
                )

    @property
    def split(self) -> ModelPlan:
        """The run's cut and prompts."""
        return self.plan.model

    @property
    def unmerged(self) -> ModelPlan:
        """The run's cut and prompts with all image tokens, for methods that merge none."""
        return self.split.replace(keep_tokens=0)

    @property
    def selected_samples(self) -> int:
        """Samples of a round's split training.

        A share of each class, rounded up, may be a few samples more.
        """
        return selected_count(self.train_samples, self.plan.training.keep_fraction)
