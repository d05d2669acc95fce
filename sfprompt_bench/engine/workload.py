"""The workload of the engine's benchmark: model, loads, repetitions and their statistics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol.messages import parse_message
from protocol.plan import ModelPlan, RunPlan
from split_model.backbone.architecture import anatomy

_PROMPTS = 5

_ROUND_TIMEOUT_S = 7 * 86_400.0  # longer than any measurement

_TENSOR_BYTES = 1_500_000  # of the round trip's tensor, approximately


@dataclass(frozen=True)
class Load:
    """A number of clients, and the samples of each in a step."""

    clients: int
    batch: int

    @property
    def samples(self) -> int:
        return self.clients * self.batch

    def __str__(self) -> str:
        return f"{self.clients}x{self.batch}"


@dataclass(frozen=True)
class Plan:
    """The measurements and their length.

    Attributes:
        loads: for the comparison with the plain loop.
        repetitions: of each measurement.
        seconds: of one measurement, approximately.
        roundtrip_repetitions: of the round trips, in turn with the echo's.
        roundtrip_steps: steps of one such repetition, of two round trips each.
        curve_clients, curve_batches: the curve's points are all their pairs.
        curve_samples: maximum of a point's clients x batch; larger points are left out.
        curve_repetitions, curve_seconds: of each point.
        soak: the clients of the soak and their batch.
        soak_s: length of the soak.
    """

    loads: tuple[Load, ...] = (Load(8, 16), Load(8, 32), Load(1, 32))
    repetitions: int = 13
    seconds: float = 4.0
    roundtrip_repetitions: int = 101
    roundtrip_steps: int = 8
    curve_clients: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    curve_batches: tuple[int, ...] = (1, 4, 16, 32)
    curve_samples: int = 2048
    curve_repetitions: int = 2
    curve_seconds: float = 2.0
    soak: Load = Load(64, 4)
    soak_s: float = 600.0

    @property
    def max_clients(self) -> int:
        """Clients of the largest load."""
        loads = [load.clients for load in (*self.loads, self.soak)]
        return max(*loads, *self.curve_clients)


QUICK_CUT = 6  # half the body takes half the time; the network's share doubles

QUICK = Plan(
    repetitions=3,
    seconds=1.5,
    roundtrip_repetitions=25,
    curve_clients=(1, 8),
    curve_batches=(1, 4),
    curve_repetitions=1,
    curve_seconds=1.0,
    soak=Load(64, 1),
    soak_s=20.0,
)


@dataclass(frozen=True)
class EngineSetting:
    """The measured model, and where its body runs.

    Args:
        backbone: timm's name of the model; its weights are random.
        image_size: pixels a side.
        cut: blocks in the head.
        device, dtype: of the body, as in `split-server serve`.
        plan: the measurements.
    """

    backbone: str = "vit_small_patch14_dinov2"
    image_size: int = 42
    cut: int = 1
    device: str = "cpu"
    plan: Plan = Plan()
    dtype: str = "auto"

    @property
    def placement(self) -> dict[str, str]:
        """Device and dtype of the body, as settings of a server."""
        return {"device": self.device, "dtype": self.dtype}

    @property
    def model(self) -> ModelPlan:
        """The model of all measurements except the round trip's.

        Raises:
            InvalidField: there is no such cut or backbone.
        """
        return self._model(self.cut, _PROMPTS)

    @property
    def empty_model(self) -> ModelPlan:
        """The model with an empty body: all blocks are in the head."""
        depth = anatomy(self.model).depth
        return self._model(depth, 0)

    def _model(self, cut: int, prompts: int) -> ModelPlan:
        values = {
            "backbone": self.backbone,
            "weights": "random:0",
            "image_size": self.image_size,
            "cut": cut,
            "prompt_count": prompts,
            # A step has a backward request only if something before the body is tuned.
            "tune": "tail" if prompts else "bias",
        }
        return parse_message(ModelPlan, values)

    @property
    def run(self) -> RunPlan:
        """A run in the paper's form whose first round stays open, in float32 on the wire."""
        return _run(self.model, self.plan.max_clients, 32)

    @property
    def empty_run(self) -> RunPlan:
        """A run with the empty body, for one device and the round trip's tensor."""
        return _run(self.empty_model, 1, self.roundtrip_shape[0])

    @property
    def roundtrip_shape(self) -> tuple[int, int, int]:
        """[B, T, D] of the round trip's tensor, about 1.5 MB in float32."""
        _, tokens, width = shape_of(self.empty_model, 1)
        return max(1, round(_TENSOR_BYTES / (4 * tokens * width))), tokens, width


def shape_of(model: ModelPlan, batch: int) -> tuple[int, int, int]:
    """[B, T, D] of a batch's smashed data, prompts at the input included."""
    sizes = anatomy(model)
    return batch, sizes.tokens + model.prompt_count, sizes.width


def _run(model: ModelPlan, participants: int, batch: int) -> RunPlan:
    values = {
        "name": "engine",
        "model": model.model_dump(),
        "federation": {
            "rounds": 1,
            "min_participants": participants,
            "round_timeout_s": _ROUND_TIMEOUT_S,
            "evaluate_every": 0,
        },
        "training": {"batch_size": batch},
    }
    return parse_message(RunPlan, values)


@dataclass(frozen=True)
class Spread:
    """The values of some measurements."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def minimum(self) -> float:
        return min(self.values)

    @property
    def maximum(self) -> float:
        return max(self.values)

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "least": self.minimum, "most": self.maximum, "n": len(self)}

    def __len__(self) -> int:
        return len(self.values)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = math.ceil(share * len(ordered))
    return ordered[max(0, min(len(ordered), rank) - 1)]
