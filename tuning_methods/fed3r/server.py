"""The server's side of Fed3R: solves for the classifier from the devices' sums."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from protocol.errors import InvalidField, WrongShape
from protocol.frames import Frame
from protocol.plan import RunPlan
from split_model.checkpoints.state import device_shapes
from split_server.method import RoundMean, ServerMethod
from split_server.payloads.tensors import decode_floats
from tuning_methods.fed3r.ridge import solve_ridge
from tuning_methods.fed3r.settings import strength_of
from tuning_methods.fed3r.sums import CLASSES, GRAM, sums_shapes, unpack_gram

WEIGHT, BIAS = "tail.head.weight", "tail.head.bias"


class Fed3RServer(ServerMethod):
    """The new classifier is the ridge regression on all devices' features.

    Source: Fed3R (arXiv 2406.01116, section 3).
    """

    def check(self, plan: RunPlan) -> None:
        super().check(plan)
        rule = plan.federation.aggregation
        if rule in ("median", "trimmed-mean"):
            raise InvalidField(
                "fed3r adds sums; this rule would take each of their numbers by itself",
                field="federation.aggregation",
                limit=["fedavg", "krum", "multi-krum"],
                value=rule,
            )
        names = sorted(device_shapes(plan.model))
        if names != [BIAS, WEIGHT]:
            raise InvalidField(
                "fed3r needs a backbone with one linear classifier",
                field="model.backbone",
                limit=[BIAS, WEIGHT],
                value=names,
            )

    def extra_shapes(self, plan: RunPlan, round_: int) -> Mapping[str, tuple[int, ...]]:
        num_classes, width = device_shapes(plan.model)[WEIGHT]
        return sums_shapes(width, num_classes)

    def decode_extras(self, plan: RunPlan, round_: int, frame: Frame) -> dict[str, Tensor]:
        """Decode the mean products of the features, [(F + 1) (F + 2) / 2] and [F + 1, C].

        Raises:
            WrongShape: a tensor is missing or has another shape.
            NonFinite: it contains NaN or infinity.
            InvalidField: the shares of the classes are below 0 or above 1.
        """
        tensors = {}
        for name, shape in self.extra_shapes(plan, round_).items():
            spec = frame.specs.get(name)
            if spec is None or spec.shape != shape:
                raise WrongShape(
                    "an update of fed3r must contain the sums over the device's features",
                    field=name,
                    limit=list(shape),
                    value="missing" if spec is None else list(spec.shape),
                )
            tensors[name] = decode_floats(frame, name)
        shares = tensors[CLASSES][-1]
        for extreme in (shares.min().item(), shares.max().item()):
            if not 0 <= extreme <= 1:
                raise InvalidField(
                    "the last row has the classes' shares of the samples",
                    field=CLASSES,
                    limit=[0, 1],
                    value=extreme,
                )
        return tensors

    def next_state(self, plan: RunPlan, mean: RoundMean) -> dict[str, Tensor]:
        classes = mean.extras[CLASSES].double()
        gram = unpack_gram(mean.extras[GRAM], len(classes))
        solution = solve_ridge(gram, classes, mean.samples, strength_of(plan))
        return {WEIGHT: solution.weight.float(), BIAS: solution.bias.float()}
