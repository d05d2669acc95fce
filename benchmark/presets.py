"""Settings of the runs that `sfprompt-bench` starts, by data set."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import NotFound
from protocol.settings import (
    BackboneSettings,
    FederationSettings,
    RunSettings,
    TrainingSettings,
)


@dataclass(frozen=True)
class Preset:
    """A run and the data that it is for."""

    data: str  # as `edge-client --data` takes it
    settings: RunSettings
    limit_train: int | None = None  # images over all devices
    limit_test: int | None = None


def _digits() -> Preset:
    return Preset(
        data="digits",
        settings=RunSettings(
            name="digits",
            model=BackboneSettings(image_size=42, cut=1, num_classes=10),
            federation=FederationSettings(rounds=8),
            training=TrainingSettings(keep_fraction=0.5, local_epochs=1),
        ),
    )


def _fashion_mnist() -> Preset:
    return Preset(
        data="fashion-mnist",
        settings=RunSettings(
            name="fashion-mnist",
            model=BackboneSettings(image_size=56, cut=1, num_classes=10),
            federation=FederationSettings(rounds=8),
            training=TrainingSettings(keep_fraction=0.5, local_epochs=1),
        ),
        limit_train=6000,
        limit_test=2000,
    )


PRESETS = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def preset_named(name: str) -> Preset:
    """The preset for a data set.

    Raises:
        NotFound: there is none.
    """
    make = PRESETS.get(name)
    if make is None:
        raise NotFound(
            "there is no preset for this data set", field="data", limit=sorted(PRESETS), value=name
        )
    return make()
