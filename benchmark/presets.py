"""Settings of the runs that `sfprompt-bench` starts, by data set."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.data.fashion_mnist import CLASSES
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


# Found by trial on Fashion-MNIST. A device makes few steps a round, so the rates are high; the
# tail is a classifier on normalised features and stands that. Pruning by EL2N over all classes
# together drops whole classes while the classifier is fresh: it is done within each class.
_RECIPE = TrainingSettings(
    keep_fraction=0.5,
    prune_per_class=True,
    local_epochs=1,
    local_learning_rate_scale=0.1,
    batch_size=16,
    prompt_learning_rate=1e-2,
    tail_learning_rate=2e-2,
)


def _digits() -> Preset:
    return Preset(
        data="digits",
        settings=RunSettings(
            name="digits",
            model=BackboneSettings(image_size=42, cut=1, num_classes=10, prompt_count=5),
            federation=FederationSettings(rounds=8),
            training=_RECIPE,
        ),
    )


def _fashion_mnist() -> Preset:
    return Preset(
        data="fashion-mnist",
        settings=RunSettings(
            name="fashion-mnist",
            class_names=CLASSES,
            model=BackboneSettings(image_size=42, cut=1, num_classes=10, prompt_count=5),
            federation=FederationSettings(rounds=10, evaluate_every=2),
            training=_RECIPE.model_copy(update={"keep_fraction": 0.8}),
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
