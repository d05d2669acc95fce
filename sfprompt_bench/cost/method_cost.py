"""The input of a cost calculation, a run and a device, and its result, what a method costs."""

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


@dataclass(frozen=True)
class MethodCost:
    """Payload bytes, operations and memory of one device in the rounds that it trains in.

    **Bytes** are those of the encoded tensors. HTTP and frame headers, control messages and
    retries are left out.

    **Operations** are floating-point operations of training, a multiplication and its addition
    counted as two, as torch counts them: matrix products, convolutions and attention. With a
    layer's forward pass as 1x, its backward pass is 2x (gradients of its input and of its
    weights). It is 1x if the layer is frozen and only passes the gradient of its input on, or if
    only its weights are trained and nothing before it. Layers before everything that is trained
    have no backward pass. Evaluation is left out for all methods alike.

    **Memory** is the model's weights, the gradients and AdamW's two moments of what the device
    trains, and the activations of one batch (`sfprompt_bench.cost.sizes.peak_bytes`), in float32.
    Cached images, the libraries and their workspaces are left out.

    Attributes:
        trainable_parameters: numbers that the method tunes, on the device or on the server.
        bytes_start: downloaded before the first round.
        bytes_up_per_round: sent in a round of training.
        bytes_down_per_round: received in a round of training.
        device_flops_per_round: of a round of training.
        device_peak_bytes: maximum memory at one time.
        bytes_up_once: sent once in the run, in the first rounds.
        bytes_up_per_evaluation: sent for each evaluation of the global state.
        bytes_down_per_evaluation: received for each evaluation of the global state.
        evaluate_every: rounds between evaluations; 0: no evaluation. The last round always has
            one otherwise.
        device_flops_once: computed once in the run.
        bytes_up_per_renewal: sent in a round after which the server distils the proxy again.
        bytes_down_per_renewal: received after such a round.
        device_flops_per_renewal: computed for it.
        renew_every: rounds between distillations; 0: none. None follows the last round.
    """

    trainable_parameters: int
    bytes_start: int
    bytes_up_per_round: int
    bytes_down_per_round: int
    device_flops_per_round: int
    device_peak_bytes: int
    bytes_up_once: int = 0
    bytes_up_per_evaluation: int = 0
    bytes_down_per_evaluation: int = 0
    evaluate_every: int = 0
    device_flops_once: int = 0
    bytes_up_per_renewal: int = 0
    bytes_down_per_renewal: int = 0
    device_flops_per_renewal: int = 0
    renew_every: int = 0

    @property
    def bytes_per_round(self) -> int:
        """Bytes of a round of training, both directions."""
        return self.bytes_up_per_round + self.bytes_down_per_round

    @property
    def bytes_per_evaluation(self) -> int:
        """Bytes of an evaluation, both directions."""
        return self.bytes_up_per_evaluation + self.bytes_down_per_evaluation

    def evaluations(self, rounds: int) -> int:
        """Count the evaluations in a run of ``rounds`` rounds."""
        if self.evaluate_every == 0:
            return 0
        return -(-rounds // self.evaluate_every)

    def renewals(self, rounds: int) -> int:
        """Count the repeated distillations in a run of ``rounds`` rounds."""
        return max(0, rounds - 1) // self.renew_every if self.renew_every else 0

    def bytes_renewed(self, rounds: int) -> int:
        """Bytes of the repeated distillations in a run of ``rounds`` rounds, both directions."""
        return self.renewals(rounds) * (self.bytes_up_per_renewal + self.bytes_down_per_renewal)

    def bytes_total(self, rounds: int, trained: int | None = None) -> int:
        """Bytes of a run of ``rounds`` rounds, both directions, start included.

        Args:
            rounds: of the run.
            trained: rounds in which the device trains; None: all.

        Raises:
            InvalidField: ``rounds`` is negative.
        """
        _check_rounds(rounds)
        trained = rounds if trained is None else trained
        training = trained * self.bytes_per_round + (self.bytes_up_once if rounds else 0)
        evaluation = self.evaluations(rounds) * self.bytes_per_evaluation
        return self.bytes_start + training + evaluation + self.bytes_renewed(rounds)

    def flops_total(self, rounds: int) -> int:
        """Operations of training in a run of ``rounds`` rounds.

        Raises:
            InvalidField: ``rounds`` is negative.
        """
        _check_rounds(rounds)
        renewed = self.renewals(rounds) * self.device_flops_per_renewal
        once = self.device_flops_once if rounds else 0
        return rounds * self.device_flops_per_round + once + renewed


def _check_rounds(rounds: int) -> None:
    if rounds < 0:
        raise InvalidField("rounds must be at least 0", field="rounds", limit=0, value=rounds)
