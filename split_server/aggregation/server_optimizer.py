"""Server optimisers: the mean of the updates as a gradient (Reddi et al., arXiv 2003.00295).

The pseudo-gradient is the round's global state less the mean. FedAvgM is SGD with momentum on it,
FedAdam is Adam, and FedYogi is Yogi; FedAvg takes the mean as it is and is not found here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protocol.errors import NonFinite
from protocol.federation import FederationSettings

# What an optimiser remembers from round to round: "NAME/WHAT" for each tensor of the state.
Moments = dict[str, Tensor]

_RATES = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}


def server_step(
    federation: FederationSettings,
    state: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Moments]:
    """The next global state and moments, all in float32 but Adam's count of steps.

    Equal arguments give equal bits, also where the moments come from a file.

    Args:
        federation: names the optimiser and its rates; not FedAvg.
        state: that of the round's beginning.
        mean: of the round's updates, the same tensors.
        moments: of the round before; empty ahead of the first.

    Raises:
        NonFinite: the new state is not finite.
    """
    parameters = {name: nn.Parameter(state[name].clone()) for name in sorted(state)}
    optimizer = _make(federation, list(parameters.values()))
    remembered: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in moments.items():
        name, _, what = key.rpartition("/")
        remembered[name][what] = tensor.clone()
    for name, parameter in parameters.items():
        parameter.grad = state[name] - mean[name]
        if remembered[name]:
            optimizer.state[parameter] = remembered[name]
    optimizer.step()
    after: dict[str, Tensor] = {}
    kept: Moments = {}
    for name, parameter in parameters.items():
        after[name] = parameter.detach()
        if not bool(torch.isfinite(after[name]).all()):
            raise NonFinite("the server optimiser has diverged", field=name)
        for what, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                kept[f"{name}/{what}"] = value
    return after, kept


def _make(federation: FederationSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kind, first = federation.server_optimizer, federation.server_momentum
    rate = federation.server_learning_rate
    if rate is None:
        rate = _RATES[kind]
    if kind == "fedavgm":
        return torch.optim.SGD(parameters, lr=rate, momentum=first)
    betas, tau = (first, federation.server_beta2), federation.server_tau
    if kind == "fedadam":
        # As torch has it, with Adam's correction of the first steps; the paper leaves that out.
        return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=tau)
    return Yogi(parameters, rate, betas, tau)


class Yogi(torch.optim.Optimizer):
    """Yogi as the server of FedYogi uses it (arXiv 2003.00295, algorithm 2).

    m = b1 m + (1 - b1) g; v = v - (1 - b2) g^2 sign(v - g^2); w = w - rate m / (sqrt(v) + tau),
    from m = 0 and v = tau^2.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], tau: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            (first, second), tau = group["betas"], group["tau"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                own = self.state[parameter]
                if not own:
                    own["exp_avg"] = torch.zeros_like(parameter)
                    own["exp_avg_sq"] = torch.full_like(parameter, tau**2)
                mean, variance, square = own["exp_avg"], own["exp_avg_sq"], gradient.square()
                mean.lerp_(gradient, 1 - first)
                variance.sub_(square * (variance - square).sign(), alpha=1 - second)
                parameter.addcdiv_(mean, variance.sqrt().add_(tau), value=-group["lr"])
