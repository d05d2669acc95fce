"""FedProx: what a device tunes is pulled back to the round's global state."""

from __future__ import annotations

from edge_client.device_model import DeviceModel


class Proximal:
    """The term mu / 2 * ||w - w_round||^2 of FedProx (Li et al., arXiv 1812.06127).

    It is added as its gradient, so that reported losses are those of the samples alone.

    Args:
        model: with the round's global state in it.
        strength: mu, above 0.
    """

    def __init__(self, model: DeviceModel, strength: float) -> None:
        self._strength = strength
        self._tuned = [(own, own.detach().clone()) for own in model.parameters()]

    def add_gradients(self) -> None:
        """Add the term's gradient, mu (w - w_round), to those that are there."""
        for own, start in self._tuned:
            pull = (own.detach() - start) * self._strength
            own.grad = pull if own.grad is None else own.grad + pull
