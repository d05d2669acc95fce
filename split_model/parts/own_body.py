"""A body that a server tunes on its own samples: LayerNorms, biases or LoRA, and nothing else.

What is tuned can be folded into the backbone's weights, so that nothing else learns of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protocol.plan import BodyTuning, ModelPlan
from protocol.seeds import derive_seed
from split_model.backbone.libraries import timm
from split_model.errors import ModelPlanError
from split_model.layers.adapters import LoraQkv, initial_lora, is_lora, merged
from split_model.parts.base import is_bias
from split_model.parts.body import Body
from split_model.parts.build import build_tunable_body

_ITEMSIZE = 4  # bytes of a float32

_ACTIVATIONS = 30  # numbers that a block's graph retains for each number of its input, about


class OwnBody:
    """A body in float32 with some tuned parameters.

    Args:
        settings: the model's plan.
        weights: the backbone's, by timm's names; they are not changed.
        tuning: what is tuned.
        seed: of LoRA's first values.
        device: of the body.

    Attributes:
        body: the body.

    Raises:
        ModelPlanError: the backbone has nothing of this kind.
    """

    def __init__(
        self,
        settings: ModelPlan,
        weights: Mapping[str, Tensor],
        tuning: BodyTuning,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._weights, self._settings = weights, settings
        self.body: Body = build_tunable_body(settings, weights, device)
        if tuning == "lora":
            self._add_lora(seed, device)
        for name, parameter in self.body.named_parameters():
            if _tunes(name, tuning):
                # The frozen body's tensors may share memory with the file.
                parameter.data = parameter.detach().clone()
                parameter.requires_grad_(True)
        if not self.parameters:
            limit = f"none: {settings.backbone} has nothing to tune in this way"
            raise ModelPlanError("server_tuning", limit, tuning)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tuned parameters."""
        return [each for each in self.body.parameters() if each.requires_grad]

    def nbytes(self, smashed: Tensor) -> int:
        """Return about the bytes of weights, gradients, moments and one step's graph.

        Args:
            smashed: a batch, [B, T, D].
        """
        weights = sum(parameter.numel() for parameter in self.body.parameters())
        tuned = sum(parameter.numel() for parameter in self.parameters)
        graph = _ACTIVATIONS * len(self.body.blocks) * smashed.numel()
        return _ITEMSIZE * (weights + 3 * tuned + graph)

    def folded(self) -> dict[str, Tensor]:
        """Return the backbone's weights with what was tuned, by timm's names."""
        tuned = {
            name: tensor.detach().cpu()
            for name, tensor in self._by_name().items()
            if tensor.requires_grad
        }
        plain = {name: tensor for name, tensor in tuned.items() if not is_lora(name)}
        state = {f"body.{name}": tensor for name, tensor in tuned.items() if is_lora(name)}
        weights = {name: self._weights[name] for name in self._weights}
        weights |= {name: plain[name].to(weights[name].dtype) for name in plain}
        if not state:
            return weights
        return merged(self._settings.replace(tune="tail"), weights, state)[1]

    def _by_name(self) -> dict[str, Tensor]:
        tensors = dict(self.body.state_dict(keep_vars=True))
        return {name: tensors[key] for name, key in self.body.names().items()}

    def _add_lora(self, seed: int, device: torch.device | str) -> None:
        rank = self._settings.lora_rank
        for number, block in self.body.blocks.items():
            attention: Any = getattr(block, "attn", None)
            if type(attention) is not timm.layers.Attention:
                limit = f"not lora: the attention of {self._settings.backbone} is of another kind"
                raise ModelPlanError("server_tuning", limit, "lora")
            joint = attention.qkv
            has_bias = joint.bias is not None
            changed = LoraQkv(joint.in_features, joint.out_features, has_bias, rank)
            for name, parameter in list(changed.named_parameters()):
                value = getattr(joint, name, None)
                if value is None:
                    draw = derive_seed(seed, "lora", int(number), name)
                    value = initial_lora(name, tuple(parameter.shape), draw).to(device)
                fixed = nn.Parameter(value.detach(), requires_grad=False)
                changed.register_parameter(name, fixed)
            attention.qkv = changed


def _tunes(name: str, tuning: BodyTuning) -> bool:
    if tuning == "lora":
        return is_lora(name)
    if tuning == "bias":
        return is_bias(name)
    return tuning == "layernorm" and any(part.startswith("norm") for part in name.split("."))
