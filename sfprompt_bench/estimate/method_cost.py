"""What a method costs one device."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidField


@dataclass(frozen=True)
class MethodCost:
    """Payload bytes, operations and memory of one device, for the rounds that it takes part in.

    **Bytes** are those of the tensors as they are encoded. Headers of HTTP and of frames, control
    messages and what is sent again after a failure are left out.

    **Operations** are floating-point operations of training, a multiplication and its addition
    counted as two, as torch counts them: matrix products, convolutions and attention. With the
    forward pass of a layer as 1x, its backward pass is 2x (gradients of its input and of its
    weights), and 1x where the layer is frozen and only passes the gradient of its input on, or
    where only its weights are trained and nothing ahead of it. Layers ahead of everything that is
    trained have no backward pass. Evaluation is left out for every method alike.

    **Memory** is weights + gradients and AdamW's two moments of what is trained on the device +
    the activations of one batch (`sfprompt_bench.estimate.sizes`), float32. Images in a cache, the
    libraries and their workspaces are left out.

    Attributes:
        trainable_parameters: numbers that the method tunes, on the device or on the server.
        bytes_start: downloaded before the first round.
        bytes_up_per_round: sent in a round of training.
        bytes_down_per_round: received in a round of training.
        device_flops_per_round: of a round of training.
        device_peak_bytes: the most memory at one time.
        bytes_up_once: sent once in the run, in the first rounds.
        bytes_up_per_evaluation: sent whenever the global state is evaluated.
        bytes_down_per_evaluation: received whenever the global state is evaluated.
        evaluate_every: rounds between evaluations; 0: never. The last round always has one else.
        device_flops_once: computed once in the run.
        bytes_up_per_renewal: sent in a round after which what devices hold is made anew.
        bytes_down_per_renewal: received behind such a round.
        device_flops_per_renewal: computed for it.
        renew_every: rounds between two such rounds; 0: there are none. The last is never one.
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
        """Both directions of a round of training."""
        return self.bytes_up_per_round + self.bytes_down_per_round

    @property
    def bytes_per_evaluation(self) -> int:
        """Both directions of an evaluation."""
        return self.bytes_up_per_evaluation + self.bytes_down_per_evaluation

    def evaluations(self, rounds: int) -> int:
        """How often a run of so many rounds is evaluated."""
        if self.evaluate_every == 0:
            return 0
        return -(-rounds // self.evaluate_every)

    def renewals(self, rounds: int) -> int:
        """How often what devices hold is made anew in a run of so many rounds."""
        return max(0, rounds - 1) // self.renew_every if self.renew_every else 0

    def bytes_renewed(self, rounds: int) -> int:
        """What crosses for that in a run of so many rounds, both directions."""
        each = self.bytes_up_per_renewal + self.bytes_down_per_renewal
        return self.renewals(rounds) * each

    def bytes_total(self, rounds: int, trained: int | None = None) -> int:
        """Everything that crosses in a run of so many rounds, both directions, start included.

        Args:
            rounds: of the run.
            trained: of these, those that the device is asked to train in; None: all.

        Raises:
            InvalidField: ``rounds`` is negative.
        """
        _check(rounds)
        trained = rounds if trained is None else trained
        training = trained * self.bytes_per_round + (self.bytes_up_once if rounds else 0)
        evaluation = self.evaluations(rounds) * self.bytes_per_evaluation
        return self.bytes_start + training + evaluation + self.bytes_renewed(rounds)

    def flops_total(self, rounds: int) -> int:
        """Operations of training in a run of so many rounds.

        Raises:
            InvalidField: ``rounds`` is negative.
        """
        _check(rounds)
        renewed = self.renewals(rounds) * self.device_flops_per_renewal
        once = self.device_flops_once if rounds else 0
        return rounds * self.device_flops_per_round + once + renewed


def _check(rounds: int) -> None:
    if rounds < 0:
        raise InvalidField(
            "a run has no fewer than 0 rounds", field="rounds", limit=0, value=rounds
        )
