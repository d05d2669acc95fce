"""The uncut timm model with prompts inserted by hooks: a reference independent of the parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.backbone.libraries import timm
from split_model.errors import ModelPlanError

PROMPTS = 3


def reduced(name: str) -> ModelPlan:
    """A plan with two blocks and, if the architecture allows, few features."""
    module = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    overrides: dict[str, Any] = {"depth": 2}
    image_size = 64
    fixed_width = module == "vitamin" or "_mci_" in name  # the stem's width is the blocks'
    if not fixed_width:
        overrides |= {"embed_dim": 32, "num_heads": 2}
    if not fixed_width and module != "vision_transformer_hybrid":
        overrides |= {"patch_size": 8}
        image_size = 24
    elif "s16" in name or fixed_width:
        image_size = 32
    if "sapiens2" in name:
        overrides |= {"num_kv_heads": (2, 1)}  # an entry per block
    return ModelPlan(
        backbone=name,
        image_size=image_size,
        num_classes=5,
        prompt_count=PROMPTS,
        model_overrides=tuple(overrides.items()),
    )


def refused_field(build: Callable[[], object]) -> str:
    """The field of the plan for which `build` is refused, by its limits or by the backbone."""
    with pytest.raises((ModelPlanError, ValidationError)) as caught:
        build()
    if isinstance(caught.value, ModelPlanError):
        return str(caught.value.field).removeprefix("model.")
    return ".".join(str(part) for part in caught.value.errors()[0]["loc"])


def signature(model: nn.Module) -> int:
    """Equal for models of the same modules, shapes and plain attributes."""

    def plain(value: object) -> bool:
        if isinstance(value, (tuple, list)):
            return all(plain(item) for item in value)
        return value is None or isinstance(value, (bool, int, float, str))

    parts = []
    for name, module in model.named_modules():
        attributes = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and plain(value)
        }
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(key, tuple(tensor.shape)) for key, tensor in tensors]
        parts.append((name, type(module).__name__, sorted(map(repr, attributes.items())), shapes))
    return hash(repr(parts))


def random_model(settings: ModelPlan, seed: int = 0) -> Any:
    """timm's model with random weights, so that each member affects the output."""
    model = timm.create_model(
        settings.backbone,
        img_size=settings.image_size,
        num_classes=settings.num_classes,
        **dict(settings.model_overrides),
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name == "rope.freqs":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var") or (
            tensor.ndim == 1 and name.endswith(("weight", "gamma"))
        ):
            tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
        elif "gamma_" in name:
            tensor.copy_(0.5 + 0.2 * noise)
        elif tensor.ndim < 2:
            tensor.copy_(0.2 * noise)
        elif name.endswith("weight"):
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(noise)  # tokens, positions, bias tables
    return model


@dataclasses.dataclass
class Hooks:
    """A context in which forward hooks insert prompts into an uncut model."""

    model: Any
    settings: ModelPlan
    prompts: Tensor
    handles: list[Any] = dataclasses.field(default_factory=list)

    def __enter__(self) -> Any:
        first = 0 if self.settings.prompt_at == "input" else self.settings.cut
        last = len(self.model.blocks) - self.settings.tail_blocks
        prefix, count = self.model.num_prefix_tokens, self.settings.prompt_count
        layers = self.prompts if self.prompts.ndim == 3 else self.prompts[None]

        def put(layer: int) -> Any:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                tokens = arguments[0]
                here = layers[layer][None].repeat(tokens.shape[0], 1, 1)
                skip = prefix + (count if layer else 0)
                joined = torch.hstack([tokens[:, :prefix], here, tokens[:, skip:]])
                return (joined, *arguments[1:])

            return hook

        for layer in range(layers.shape[0]):
            block = self.model.blocks[first + layer]
            self.handles.append(block.register_forward_pre_hook(put(layer)))
        assert self.settings.prompt_depth == "shallow" or layers.shape[0] == last - first

        def take(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
            others = [i for i in range(tokens.shape[1]) if not prefix <= i < prefix + count]
            return tokens[:, others]

        self.handles.append(self.model.norm.register_forward_hook(take))
        for block in list(self.model.blocks)[first:]:
            self._position(block)
        return self.model

    def _position(self, block: Any) -> None:
        attention = getattr(block, "attn", None)
        count, prefix = self.settings.prompt_count, self.model.num_prefix_tokens
        kind = type(self.model).__name__
        if kind == "Eva":
            attention.num_prefix_tokens += count
        if kind == "Beit":
            timms_own = type(attention)._get_rel_pos_bias

            def spread() -> Tensor:
                bias = timms_own(attention)
                size = bias.shape[-1] + count
                others = torch.tensor([i for i in range(size) if not prefix <= i < prefix + count])
                wide = torch.zeros(1, bias.shape[1], size, size)
                return wide.index_put((torch.tensor(0), *_grid(bias.shape[1], others)), bias[0])

            attention._get_rel_pos_bias = spread

    def __exit__(self, *_: object) -> None:
        first = 0 if self.settings.prompt_at == "input" else self.settings.cut
        for handle in self.handles:
            handle.remove()
        for block in list(self.model.blocks)[first:]:
            if type(self.model).__name__ == "Eva":
                block.attn.num_prefix_tokens -= self.settings.prompt_count
            if type(self.model).__name__ == "Beit":
                del block.attn._get_rel_pos_bias


def _grid(heads: int, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(heads)[:, None, None], others[None, :, None], others[None, None, :]


def difference(result: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    scale = expected.abs().max().item()
    return (result - expected).abs().max().item() / (scale or 1.0)
