"""What head, body and tail have in common: a timm model with all that is not theirs taken out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import Anatomy, anatomy, skeleton
from split_model.errors import TokenCountError, UnsupportedBackboneError, WeightsMismatchError
from split_model.layers.partial_block import run_for_tokens, supports_partial_run
from split_model.layers.positions import padded_bias, padded_rope, use_shared_bias
from split_model.layers.prompts import drop_prompts, insert_prompts, spread_prompts

# The members of timm's models beside the blocks, by the part that needs them.
EMBEDDING = frozenset(
    {"cls_token", "dist_token", "reg_token", "pos_embed"}
    | {"patch_embed", "pos_drop", "patch_drop", "norm_pre"}
)

POSITIONS = frozenset({"rope", "rel_pos_bias"})

OUTPUT = frozenset({"norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist"})

# Members that timm asks `is not None` of; the rest are called, so an identity replaces them.
_OPTIONAL = frozenset({"rope", "rel_pos_bias", "attn_pool", "patch_drop"})

BlockHook = Callable[[Tensor], Tensor]


class Part(nn.Module):
    """Some blocks of a timm model and those of its other members that they need.

    Built on the meta device; `fill` gives it memory. Always in eval mode: the frozen parts must
    be functions of their input alone, and the tail has no dropout.
    """

    def __init__(self, settings: ModelPlan, blocks: range, members: frozenset[str]) -> None:
        super().__init__()
        trunk: Any = skeleton(settings, blocks)
        self.settings = settings
        self.sizes: Anatomy = anatomy(settings)
        self.grid: Any = trunk.patch_embed.grid_size
        every_block = list(trunk.blocks)
        trunk.blocks = type(trunk.blocks)()
        _strip(settings, trunk, members)
        self.trunk = trunk
        # Keyed by their number in the whole model, so that names stay timm's.
        self.blocks = nn.ModuleDict({str(number): every_block[number] for number in blocks})
        if self.sizes.family == "relative":
            for block in self.blocks.values():
                use_shared_bias(block.attn)
        self.whole_blocks = False  # run each block for all tokens, whoever reads them
        super().train(False)

    def train(self, mode: bool = True) -> "Part":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def names(self) -> dict[str, str]:
        """timm's name of every tensor of this part's state, and the name it has here."""
        return {own.removeprefix("trunk."): own for own in self.state_dict()}

    def tuned(self) -> dict[str, str]:
        """As `names`, of those tensors alone that the settings have tuned."""
        own_parameters = {own for own, _ in self.named_parameters()}
        return {
            name: own
            for name, own in self.names().items()
            if self._tunes(name, parameter=own in own_parameters)
        }

    def _tunes(self, name: str, *, parameter: bool) -> bool:
        return False

    def fill(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take this part's tensors (and no others) from `tensors`, by timm's names.

        Raises `WeightsMismatchError`.
        """
        state: dict[str, Tensor] = {}
        expected = self.state_dict()
        for name, own in self.names().items():
            shape = tuple(expected[own].shape)
            if name not in tensors:
                raise WeightsMismatchError(name, f"of shape {list(shape)}", "missing")
            tensor = tensors[name].detach()
            if tuple(tensor.shape) != shape:
                limit = f"of shape {list(shape)}"
                raise WeightsMismatchError(name, limit, list(tensor.shape))
            # Learned rotary frequencies are multiplied by positions: low precision would add up.
            wide = not tensor.is_floating_point() or name.startswith("rope.")
            state[own] = tensor.to(device, tensor.dtype if wide else dtype)
        self.load_state_dict(state, assign=True)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._fill_tables(device, dtype)

    def _fill_tables(self, device: torch.device | str, dtype: torch.dtype) -> None:
        # Position tables are no part of the state: timm computes them from the sizes.
        for name, module in self.named_modules():
            waiting = [key for key, value in module.named_buffers(recurse=False) if value.is_meta]
            if not waiting:
                continue
            for key in waiting:
                table = torch.empty_like(module.get_buffer(key), device=device)
                if table.is_floating_point() and name != "trunk.rope":
                    table = table.to(dtype)
                module.register_buffer(key, table, persistent=False)
            compute: Any = getattr(module, "init_non_persistent_buffers", None)
            if compute is None:
                reason = f"{name} has tables {waiting} that timm cannot recompute"
                raise UnsupportedBackboneError(self.settings.backbone, reason)
            with torch.no_grad():
                compute()

    def prompt_tokens(self, tokens: Tensor, field: str) -> int:
        """How many prompt tokens are in [B, T, D]: 0 or `prompt_count`.

        Raises `TokenCountError` where T or D are neither case.
        """
        plain, count = self.sizes.tokens, self.settings.prompt_count
        allowed = (plain, plain + count)
        if (
            tokens.ndim != 3
            or tokens.shape[2] != self.sizes.width
            or tokens.shape[1] not in allowed
        ):
            limit = f"[batch, {plain} or {plain + count}, {self.sizes.width}]"
            raise TokenCountError(field, limit, tuple(tokens.shape))
        return int(tokens.shape[1]) - plain

    def run(
        self,
        tokens: Tensor,
        prompts: int,
        after: BlockHook | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """[B, T, D] through this part's blocks, to [B, T, D] or its first ``num_tokens`` tokens.

        `prompts` of the T tokens, behind the prefix, are untouched by positions. `after` may
        change the tokens behind each block.
        """
        return self._through(tokens, lambda _: None, prompts, after, num_tokens)

    def run_deep(
        self,
        tokens: Tensor,
        prompts: Tensor,
        after: BlockHook | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """As `run`, with fresh prompts in each block: VPT-Deep (arXiv 2203.12119, section 3.2).

        `prompts` are [L, P, D], or [B, L, P, D] with each sample's own, for L blocks; `tokens`
        come without. T' of the result is T + P, the last block's prompts among them.
        """

        def of_block(place: int) -> Tensor:
            return prompts[..., place, :, :]  # (P, D) or (B, P, D)

        return self._through(tokens, of_block, prompts.shape[-2], after, num_tokens)

    def _through(
        self,
        tokens: Tensor,
        fresh: Callable[[int], Tensor | None],
        prompts: int,
        after: BlockHook | None,
        num_tokens: int | None,
    ) -> Tensor:
        rope = self._rope(prompts) if self.blocks else None
        last, prefix = len(self.blocks) - 1, self.sizes.prefix
        for place, (number, block) in enumerate(self.blocks.items()):
            own, asking = fresh(place), supports_partial_run(block) and not self.whole_blocks
            if asking and own is not None and place < last:
                tokens = run_for_tokens(block, tokens, spread_prompts(own, tokens), tokens.shape[1])
            else:
                if own is not None:
                    tokens = insert_prompts(tokens, own, prefix)
                if asking and num_tokens is not None and place == last:
                    tokens = run_for_tokens(block, tokens, None, num_tokens)
                else:
                    tokens = self._whole(block, int(number), tokens, prompts, rope)
                if own is not None and place < last:
                    tokens = drop_prompts(tokens, prompts, prefix)
            if after is not None:
                tokens = after(tokens)
        return tokens[:, :num_tokens]

    def _whole(
        self, block: nn.Module, number: int, tokens: Tensor, prompts: int, rope: Tensor | None
    ) -> Tensor:
        result: Tensor
        if self.sizes.family == "rotary":
            mixed = rope is not None and self.trunk.rope_mixed
            result = block(tokens, rope=rope[number] if mixed and rope is not None else rope)
        elif self.sizes.family == "relative":
            result = block(tokens, shared_rel_pos_bias=self._bias(block, prompts))
        else:
            result = block(tokens)
        return result

    def _rope(self, prompts: int) -> Tensor | None:
        rope = getattr(self.trunk, "rope", None)
        if self.sizes.family != "rotary" or rope is None:
            return None
        cached = getattr(rope, "feat_shape", None) is not None
        table: Tensor = rope.get_embed() if cached else rope.get_embed(shape=self.grid)
        return padded_rope(table, prompts)

    def _bias(self, block: Any, prompts: int) -> Tensor | None:
        own: Tensor | None = block.attn.own_bias()
        shared = self.trunk.rel_pos_bias
        bias = own
        if shared is not None:
            bias = shared()[None] if own is None else own + shared()
        return None if bias is None else padded_bias(bias, self.sizes.prefix, prompts)


def is_bias(name: str) -> bool:
    """Whether timm's name is that of a bias: of a layer, or of queries or values alone."""
    last = name.rsplit(".", 1)[-1]
    return last == "bias" or last.endswith("_bias")


def _strip(settings: ModelPlan, trunk: nn.Module, members: frozenset[str]) -> None:
    for name in [*trunk._parameters, *trunk._buffers, *trunk._modules]:
        if name == "blocks" or name in members:
            continue
        if name not in EMBEDDING | POSITIONS | OUTPUT:
            # A newer timm may have grown a member whose part we cannot know.
            raise UnsupportedBackboneError(settings.backbone, f"it has an unknown member {name!r}")
        called = name in trunk._modules and name not in _OPTIONAL
        setattr(trunk, name, nn.Identity() if called else None)
