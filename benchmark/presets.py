"""Settings of the runs that `sfprompt-bench` starts: a data set, and a form of the method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from edge_client.data.fashion_mnist import CLASSES
from protocol.errors import NotFound
from protocol.settings import (
    BackboneSettings,
    FederationSettings,
    RunSettings,
    TrainingSettings,
    WireSettings,
)

Form = Literal["default", "paper"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Preset:
    """A run and the data that it is for."""

    data: str  # as `edge-client --data` takes it
    settings: RunSettings
    limit_train: int | None = None  # images over all devices
    limit_test: int | None = None


# Where the prompts join, and what crosses: as in the paper, and as this project does it.
_PAPER = BackboneSettings(image_size=42, cut=1, num_classes=10, prompt_count=5)
_DEFAULT = _PAPER.model_copy(update={"prompt_at": "cut", "prompt_depth": "deep"})
_WIRE = WireSettings(
    smashed="int4+zstd",
    features="int8",
    gradients="int4",
    stochastic_rounding=True,
    inference="float16",
    updates="float16",
    update_deltas=True,
    head="int8",
    keep_smashed=True,
    pooled_features=True,
)

# Found by trial on Fashion-MNIST. A device makes few steps a round, so the rates are high; the
# tail is a classifier on normalised features and stands that. Pruning by EL2N over all classes
# together drops whole classes while the classifier is fresh: it is done within each class.
_PAPER_RECIPE = TrainingSettings(
    keep_fraction=0.5,
    prune_per_class=True,
    local_epochs=1,
    local_learning_rate_scale=0.1,
    batch_size=8,
    prompt_learning_rate=1e-2,
    tail_learning_rate=2e-2,
)
# Many small steps, with samples drawn anew in each round. At the same bytes, gradients of 80 % of
# the samples in 4 bits, rounded at random so that they are right in the mean, do better than those
# of 60 % in 8 bits, and than features and gradients of all in 4 bits. Without a warm-up, the first
# steps of fresh prompts are too long: 160 digits a device were at 27 % after 5 rounds, not at 88 %.
_DEFAULT_RECIPE = TrainingSettings(
    keep_fraction=0.8,
    pruning="random",
    local_epochs=0,
    batch_size=8,
    prompt_learning_rate=2e-3,
    tail_learning_rate=1e-2,
    warmup_rounds=1,
)


def _run(name: str, form: Form, **more: object) -> RunSettings:
    paper = form == "paper"
    return RunSettings.model_validate(
        {
            "name": name,
            "model": _PAPER if paper else _DEFAULT,
            "training": _PAPER_RECIPE if paper else _DEFAULT_RECIPE,
            "wire": WireSettings() if paper else _WIRE,
            **more,
        }
    )


def _training(settings: RunSettings, **changes: object) -> RunSettings:
    training = settings.training.model_copy(update=changes)
    return settings.model_copy(update={"training": training})


def _digits(form: Form) -> Preset:
    settings = _run("digits", form, federation=FederationSettings(rounds=8))
    if form == "default":  # few images: all of them
        settings = _training(settings, keep_fraction=1.0)
    return Preset(data="digits", settings=settings)


def _fashion_mnist(form: Form) -> Preset:
    return Preset(
        data="fashion-mnist",
        settings=_run(
            "fashion-mnist",
            form,
            class_names=CLASSES,
            federation=FederationSettings(rounds=10, evaluate_every=2),
        ),
        limit_train=6000,
        limit_test=2000,
    )


PRESETS = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def preset_named(data: str, form: str = "default") -> Preset:
    """The preset for a data set, in one form of the method.

    Raises:
        NotFound: there is none.
    """
    make = PRESETS.get(data)
    if make is None:
        raise NotFound(
            "there is no preset for this data set", field="data", limit=sorted(PRESETS), value=data
        )
    for known in FORMS:
        if known == form:
            return make(known)
    raise NotFound("there is no such form", field="form", limit=list(FORMS), value=form)


def traffic_preset(form: Form, *, quick: bool) -> Preset:
    """What the ladder of traffic runs: Fashion-MNIST, measured at the end; or few digits."""
    if not quick:
        preset = preset_named("fashion-mnist", form)
        federation = preset.settings.federation.model_copy(update={"evaluate_every": 10})
    else:
        preset = replace(preset_named("digits", form), limit_train=720, limit_test=200)
        preset = replace(preset, settings=_training(preset.settings, keep_fraction=1.0))
        federation = FederationSettings(rounds=4, evaluate_every=4)
    settings = preset.settings.model_copy(update={"federation": federation})
    return replace(preset, settings=settings)
