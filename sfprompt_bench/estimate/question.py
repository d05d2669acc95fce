"""What is asked: a run, and one device's share of the data."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidField
from protocol.plan import ModelPlan, RunPlan
from pruning import selected_count


@dataclass(frozen=True)
class Question:
    """One device in one run. Nothing depends on the hardware.

    Args:
        settings: of the run; the other methods take from it what applies to them.
        train_samples: images that this device trains on, at least 1.
        test_samples: images that it evaluates.
        local_epochs: passes over its samples in a round of a federated method, at least 1. Those
            of the split methods are in the settings.

    Raises:
        InvalidField: a number is below its limit.
    """

    settings: RunPlan
    train_samples: int
    test_samples: int = 0
    local_epochs: int = 10

    def __post_init__(self) -> None:
        for field, least in (("train_samples", 1), ("test_samples", 0), ("local_epochs", 1)):
            value = getattr(self, field)
            if value < least:
                raise InvalidField(
                    f"{field} is at least {least}", field=field, limit=least, value=value
                )

    @property
    def split(self) -> ModelPlan:
        """The cut and the prompts of the run."""
        return self.settings.model

    @property
    def unmerged(self) -> ModelPlan:
        """The same with all image tokens, as methods have it that merge none."""
        return self.split.replace(keep_tokens=0)

    @property
    def kept(self) -> int:
        """Samples of a round's split training. Keeping a share of each class may round up more."""
        return selected_count(self.train_samples, self.settings.training.keep_fraction)
