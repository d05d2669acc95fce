"""Server optimisers, which use the mean of the updates as a gradient.

The pseudo-gradient is the round's global state minus the mean of the updates. FedAvgM runs SGD with
momentum on it, FedAdam runs Adam and FedYogi runs Yogi. FedAvg uses the mean itself (`fedavg`).

Source: Reddi et al., arXiv 2003.00295.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protocol.errors import NonFinite
from protocol.federation import FederationSettings

# The state of the optimiser between rounds, by "TENSOR/MOMENT".
Moments = dict[str, Tensor]

_RATES = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}


def server_step(
    federation: FederationSettings,
    state: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Moments]:
    """Run one optimiser step.

    Equal arguments give equal results, bit for bit.

    Args:
        federation: settings of the optimiser, which is not FedAvg.
        state: the global state before the round.
        mean: mean of the round's updates, with the same tensors.
        moments: moments after the previous round; empty before the first.

    Returns:
        The next global state and moments, all in float32 except Adam's step count.

    Raises:
        NonFinite: the new state is not finite.
    """
    parameters = {name: nn.Parameter(state[name].clone()) for name in sorted(state)}
    optimizer = _make_optimizer(federation, list(parameters.values()))
    moments_by_name: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in moments.items():
        name, _, moment = key.rpartition("/")
        moments_by_name[name][moment] = tensor.clone()
    for name, parameter in parameters.items():
        parameter.grad = state[name] - mean[name]
        if moments_by_name[name]:
            optimizer.state[parameter] = moments_by_name[name]
    optimizer.step()
    next_state: dict[str, Tensor] = {}
    next_moments: Moments = {}
    for name, parameter in parameters.items():
        next_state[name] = parameter.detach()
        if not bool(torch.isfinite(next_state[name]).all()):
            raise NonFinite("the server optimiser has diverged", field=name)
        for moment, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                next_moments[f"{name}/{moment}"] = value
    return next_state, next_moments


def _make_optimizer(
    federation: FederationSettings, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    kind, first = federation.server_optimizer, federation.server_momentum
    rate = federation.server_learning_rate
    if rate is None:
        rate = _RATES[kind]
    if kind == "fedavgm":
        return torch.optim.SGD(parameters, lr=rate, momentum=first)
    betas, tau = (first, federation.server_beta2), federation.server_tau
    if kind == "fedadam":
        # torch's Adam corrects the bias of the first steps; the paper's does not.
        return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=tau)
    return Yogi(parameters, rate, betas, tau)


class Yogi(torch.optim.Optimizer):
    """Yogi as FedYogi's server runs it.

    m = b1 m + (1 - b1) g; v = v - (1 - b2) g^2 sign(v - g^2); w = w - rate m / (sqrt(v) + tau),
    starting from m = 0 and v = tau^2.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], tau: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Run one step for all parameters that have a gradient."""
        for group in self.param_groups:
            (first, second), tau = group["betas"], group["tau"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.full_like(parameter, tau**2)
                mean, variance, square = state["exp_avg"], state["exp_avg_sq"], gradient.square()
                mean.lerp_(gradient, 1 - first)
                variance.sub_(square * (variance - square).sign(), alpha=1 - second)
                parameter.addcdiv_(mean, variance.sqrt().add_(tau), value=-group["lr"])
