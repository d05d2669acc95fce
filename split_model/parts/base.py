"""The base class of head, body and tail: a timm model without the members of other parts."""

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

# The members of timm's models besides the blocks, by the part that needs them.
EMBEDDING = frozenset(
    {"cls_token", "dist_token", "reg_token", "pos_embed"}
    | {"patch_embed", "pos_drop", "patch_drop", "norm_pre"}
)

POSITIONS = frozenset({"rope", "rel_pos_bias"})

OUTPUT = frozenset({"norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist"})

# timm tests these members for None; it calls the others, so an identity replaces them.
_OPTIONAL = frozenset({"rope", "rel_pos_bias", "attn_pool", "patch_drop"})

BlockHook = Callable[[Tensor], Tensor]


class Part(nn.Module):
    """Consecutive blocks of a timm model, with the other members that they need.

    Built on the meta device; `fill` allocates memory. Always in eval mode: the frozen parts must
    be functions of their input alone, and the tail has no dropout.
    """

    def __init__(self, settings: ModelPlan, blocks: range, members: frozenset[str]) -> None:
        super().__init__()
        trunk: Any = skeleton(settings, blocks)
        self.settings = settings
        self.sizes: Anatomy = anatomy(settings)
        self.grid: Any = trunk.patch_embed.grid_size
        all_blocks = list(trunk.blocks)
        trunk.blocks = type(trunk.blocks)()
        _strip(settings, trunk, members)
        self.trunk = trunk
        # Keyed by the number in the whole model, so that names stay timm's.
        self.blocks = nn.ModuleDict({str(number): all_blocks[number] for number in blocks})
        if self.sizes.family == "relative":
            for block in self.blocks.values():
                use_shared_bias(block.attn)
        self.whole_blocks = False  # compute all tokens in each block, even those nobody reads
        super().train(False)

    def train(self, mode: bool = True) -> "Part":
        """Do nothing: a part stays in eval mode."""
        return super().train(False)

    def names(self) -> dict[str, str]:
        """Map timm's names of this part's tensors to the names in `state_dict`."""
        return {key.removeprefix("trunk."): key for key in self.state_dict()}

    def tuned(self) -> dict[str, str]:
        """The entries of `names` whose tensors the plan tunes."""
        parameters = {key for key, _ in self.named_parameters()}
        return {
            name: key
            for name, key in self.names().items()
            if self._tunes(name, parameter=key in parameters)
        }

    def _tunes(self, name: str, *, parameter: bool) -> bool:
        return False

    def fill(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load this part's tensors; no others are read.

        Args:
            tensors: by timm's names.
            device: of the part.
            dtype: of the floating-point tensors, except learned rotary frequencies.

        Raises:
            WeightsMismatchError: a tensor is missing or has another shape.
        """
        state: dict[str, Tensor] = {}
        expected = self.state_dict()
        for name, key in self.names().items():
            shape = tuple(expected[key].shape)
            if name not in tensors:
                raise WeightsMismatchError(name, f"of shape {list(shape)}", "missing")
            tensor = tensors[name].detach()
            if tuple(tensor.shape) != shape:
                limit = f"of shape {list(shape)}"
                raise WeightsMismatchError(name, limit, list(tensor.shape))
            # Positions multiply the learned rotary frequencies and would amplify rounding.
            keep_dtype = not tensor.is_floating_point() or name.startswith("rope.")
            state[key] = tensor.to(device, tensor.dtype if keep_dtype else dtype)
        self.load_state_dict(state, assign=True)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._fill_tables(device, dtype)

    def _fill_tables(self, device: torch.device | str, dtype: torch.dtype) -> None:
        # Position tables are not in the state: timm computes them from the sizes.
        for name, module in self.named_modules():
            empty = [key for key, value in module.named_buffers(recurse=False) if value.is_meta]
            if not empty:
                continue
            for key in empty:
                table = torch.empty_like(module.get_buffer(key), device=device)
                if table.is_floating_point() and name != "trunk.rope":
                    table = table.to(dtype)
                module.register_buffer(key, table, persistent=False)
            compute: Any = getattr(module, "init_non_persistent_buffers", None)
            if compute is None:
                reason = f"timm cannot recompute the tables {empty} of {name}"
                raise UnsupportedBackboneError(self.settings.backbone, reason)
            with torch.no_grad():
                compute()

    def prompt_tokens(self, tokens: Tensor, field: str) -> int:
        """The number of prompt tokens in [B, T, D], 0 or `prompt_count`.

        Args:
            tokens: [B, T, D].
            field: the name of the tensor in an error.

        Raises:
            TokenCountError: T or D fit neither case.
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
        """Run this part's blocks.

        Args:
            tokens: [B, T, D].
            prompts: number of prompt tokens behind the prefix; positions do not change them.
            after: changes the tokens behind each block.
            num_tokens: return only this many leading tokens; None: all.

        Returns:
            [B, T, D] or [B, num_tokens, D].
        """
        return self._run_blocks(tokens, lambda _: None, prompts, after, num_tokens)

    def run_deep(
        self,
        tokens: Tensor,
        prompts: Tensor,
        after: BlockHook | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Run the blocks with new prompts in each: VPT-Deep (arXiv 2203.12119, section 3.2).

        Args:
            tokens: [B, T, D], without prompts.
            prompts: [L, P, D], or [B, L, P, D] with different prompts for each sample; L blocks.
            after: changes the tokens behind each block.
            num_tokens: return only this many leading tokens; None: all.

        Returns:
            [B, T + P, D] with the last block's prompts, or [B, num_tokens, D].
        """

        def of_block(place: int) -> Tensor:
            return prompts[..., place, :, :]  # (P, D) or (B, P, D)

        return self._run_blocks(tokens, of_block, prompts.shape[-2], after, num_tokens)

    def _run_blocks(
        self,
        tokens: Tensor,
        prompts_of: Callable[[int], Tensor | None],
        prompts: int,
        after: BlockHook | None,
        num_tokens: int | None,
    ) -> Tensor:
        rope = self._rope(prompts) if self.blocks else None
        last, prefix = len(self.blocks) - 1, self.sizes.prefix
        for place, (number, block) in enumerate(self.blocks.items()):
            new_prompts = prompts_of(place)
            partial = supports_partial_run(block) and not self.whole_blocks
            if partial and new_prompts is not None and place < last:
                spread = spread_prompts(new_prompts, tokens)
                tokens = run_for_tokens(block, tokens, spread, tokens.shape[1])
            else:
                if new_prompts is not None:
                    tokens = insert_prompts(tokens, new_prompts, prefix)
                if partial and num_tokens is not None and place == last:
                    tokens = run_for_tokens(block, tokens, None, num_tokens)
                else:
                    tokens = self._run_whole(block, int(number), tokens, prompts, rope)
                if new_prompts is not None and place < last:
                    tokens = drop_prompts(tokens, prompts, prefix)
            if after is not None:
                tokens = after(tokens)
        return tokens[:, :num_tokens]

    def _run_whole(
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
        bias: Tensor | None = block.attn.block_bias()
        shared = self.trunk.rel_pos_bias
        if shared is not None:
            bias = shared()[None] if bias is None else bias + shared()
        return None if bias is None else padded_bias(bias, self.sizes.prefix, prompts)


def is_bias(name: str) -> bool:
    """Whether timm's name is a bias: of a layer, or of queries or values alone."""
    last = name.rsplit(".", 1)[-1]
    return last == "bias" or last.endswith("_bias")


def _strip(settings: ModelPlan, trunk: nn.Module, members: frozenset[str]) -> None:
    for name in [*trunk._parameters, *trunk._buffers, *trunk._modules]:
        if name == "blocks" or name in members:
            continue
        if name not in EMBEDDING | POSITIONS | OUTPUT:
            # A newer timm may add a member that belongs to an unknown part.
            raise UnsupportedBackboneError(settings.backbone, f"it has an unknown member {name!r}")
        called = name in trunk._modules and name not in _OPTIONAL
        setattr(trunk, name, nn.Identity() if called else None)
