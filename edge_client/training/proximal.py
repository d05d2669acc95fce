"""The FedProx term, which pulls what a device tunes towards the round's global state."""

from __future__ import annotations

from edge_client.model import Model
from edge_client.torch_model import TorchModel


class Proximal:
    """The FedProx term mu / 2 * ||w - w_round||^2 (Li et al., arXiv 1812.06127).

    Only its gradient is used, so that reported losses do not include it.

    Args:
        model: the model, with the round's global state.
        strength: mu, above 0.
    """

    def __init__(self, model: TorchModel, strength: float) -> None:
        self._strength = strength
        self._tuned = [(tensor, tensor.detach().clone()) for tensor in model.parameters()]

    def add_gradients(self) -> None:
        """Add the term's gradient, mu * (w - w_round), to the parameters' gradients."""
        for parameter, start in self._tuned:
            pull = (parameter.detach() - start) * self._strength
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull


def proximal_of(model: Model, strength: float) -> Proximal:
    """Return the term of a device's model.

    Raises:
        TypeError: the model has no gradients.
    """
    if not isinstance(model, TorchModel):
        raise TypeError(f"gradients need torch, not a {type(model).__name__}")
    return Proximal(model, strength)
