"""What an update tells of the neurons of the proxy's MLPs, in rounds that ask for it."""

from __future__ import annotations

from torch import Tensor

from protocol.errors import InvalidField, WrongShape
from protocol.frames import Frame
from protocol.messages import NEURONS
from protocol.settings import RunSettings
from split_model import SplitSettings
from split_model.neurons import neurons_shape
from split_server.intake import read_floats


def asked_shape(settings: RunSettings, round_: int) -> tuple[int, int] | None:
    """The shape [layers, neurons] of what an update of this round has to tell; None: nothing."""
    if not settings.distillation.due(round_, settings.federation.rounds):
        return None
    return neurons_shape(SplitSettings.of(settings.model))


def read_neurons(frame: Frame, settings: RunSettings, round_: int) -> dict[str, Tensor]:
    """How often each neuron was inactive, [layers, neurons], by its name; empty where unasked.

    Raises:
        WrongShape: it is missing, or of another shape.
        InvalidField: a number is no share, or its codec carries no floating-point numbers.
        NonFinite: NaN or infinity in it.
    """
    shape = asked_shape(settings, round_)
    if shape is None:
        return {}
    spec = frame.specs.get(NEURONS)
    if spec is None or spec.shape != shape:
        raise WrongShape(
            "an update of this round tells how often each neuron was inactive",
            field=NEURONS,
            limit=list(shape),
            value="missing" if spec is None else list(spec.shape),
        )
    shares = read_floats(frame, NEURONS)
    for found in (shares.min().item(), shares.max().item()):
        if not 0 <= found <= 1:
            raise InvalidField(
                "how often a neuron was inactive is a share of the tokens",
                field=NEURONS,
                limit=[0, 1],
                value=found,
            )
    return {NEURONS: shares}
