"""What is cut, where, and where the prompts go: the settings that both ends must share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args

from protocol.plan import ModelPlan, PromptDepth, PromptPlacement, ProxyKind, Tuned
from split_model.errors import SplitSettingsError

PROXY_TUNED = ("tail", "classifier", "lora")  # what fits the proxy and its backbone alike

HEAD_TUNED = ("bias", "adapter", "lora", "full")  # of these, those that change the head

# Settled by the other fields, or would load weights behind our back.
_RESERVED_OVERRIDES = frozenset(
    {"img_size", "num_classes", "in_chans", "pretrained", "pretrained_cfg", "checkpoint_path"}
    | {"pretrained_cfg_overlay", "features_only", "use_naflex", "cache_dir", "device", "dtype"}
)


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """How a backbone is cut and prompted. Limits that need the architecture (the largest `cut`)
    are checked when it is built; the others here.

    Raises `SplitSettingsError` for a value outside its limit.
    """

    backbone: str = "vit_small_patch14_dinov2"  # a name that timm knows, with or without its tag
    image_size: int = 56  # pixels, both sides
    cut: int = 1  # blocks in the head, 0 … depth − tail_blocks
    tail_blocks: int = 0  # blocks in the tail, besides norm, pooling and classifier
    num_classes: int = 10
    prompt_at: PromptPlacement = "input"  # before the head's first block, or the body's
    prompt_depth: PromptDepth = "shallow"  # deep: fresh ones before each block of head or body
    prompt_count: int = 10  # soft tokens per insertion; 0: none
    keep_tokens: int = 0  # image tokens behind the cut, the most similar merged; 0: all of them
    model_overrides: tuple[tuple[str, Any], ...] = ()  # further arguments of timm.create_model
    tune: Tuned = "tail"  # what is tuned beside the prompts
    adapter_width: int = 96  # numbers inside the bottleneck, where `tune` is "adapter"
    tune_body: bool = False  # whether the body is tuned too, beside all of head and tail
    lora_rank: int = 8  # of each change of a matrix, where `tune` is "lora"
    lora_ends: int = 0  # blocks at either end that get such changes; 0: all blocks
    proxy: ProxyKind = "none"  # the model is a smaller one, made from the backbone
    proxy_ends: int = 1  # blocks at either end that it has as they are
    proxy_width: int = 0  # neurons of the other MLPs, where it is "pruned"; 0: a quarter
    proxy_blocks: int = 0  # blocks in all, where it is "dropped"; 0: half

    local_body: int = 0  # blocks of a small body on the device, for its local update; 0: none

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, str) or not self.backbone:
            raise SplitSettingsError("backbone", "a non-empty string", self.backbone)
        for field, low, high in (
            ("image_size", 1, 4096),
            ("cut", 0, 1024),
            ("tail_blocks", 0, 1024),
            ("num_classes", 1, 1_000_000),
            ("prompt_count", 0, 4096),
            ("keep_tokens", 0, 65_536),
            ("adapter_width", 1, 4096),
            ("lora_rank", 1, 1024),
            ("lora_ends", 0, 1024),
            ("proxy_ends", 0, 1024),
            ("proxy_width", 0, 65_536),
            ("proxy_blocks", 0, 1024),
            ("local_body", 0, 1024),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SplitSettingsError(field, f"an integer from {low} to {high}", value)
        for field, literal in (("prompt_at", PromptPlacement), ("prompt_depth", PromptDepth)):
            if getattr(self, field) not in get_args(literal):
                limit = " or ".join(map(repr, get_args(literal)))
                raise SplitSettingsError(field, limit, getattr(self, field))
        if self.prompt_depth == "deep" and self.prompt_at == "input" and self.cut == 0:
            limit = "'shallow' where prompt_at is 'input' and the head has no blocks"
            raise SplitSettingsError("prompt_depth", limit, self.prompt_depth)
        self._check_tune()
        self._check_proxy()
        if self.keep_tokens and self.prompt_at != "cut":
            limit = "0 where prompt_at is 'input': prompts are not to be merged"
            raise SplitSettingsError("keep_tokens", limit, self.keep_tokens)
        object.__setattr__(self, "model_overrides", _overrides(self.model_overrides))

    def _check_tune(self) -> None:
        if self.tune not in get_args(Tuned):
            raise SplitSettingsError("tune", f"one of {list(get_args(Tuned))}", self.tune)
        if self.tune in HEAD_TUNED and self.prompt_at == "cut":
            limit = "'tail' or 'classifier' where prompt_at is 'cut': the head never changes"
            raise SplitSettingsError("tune", limit, self.tune)
        if self.tune == "adapter" and self.cut == 0:
            limit = "another than 'adapter' where the head has no blocks"
            raise SplitSettingsError("tune", limit, self.tune)
        if not isinstance(self.tune_body, bool):
            raise SplitSettingsError("tune_body", "true or false", self.tune_body)
        if self.tune_body and (self.tune != "full" or self.prompt_count):
            limit = "false unless tune is 'full' and prompt_count 0"
            raise SplitSettingsError("tune_body", limit, self.tune_body)

    def _check_proxy(self) -> None:
        if self.local_body and (self.prompt_at == "cut" or self.proxy != "none"):
            limit = "0 for a proxy, and where prompts join at the cut"
            raise SplitSettingsError("local_body", limit, self.local_body)
        if self.proxy not in get_args(ProxyKind):
            raise SplitSettingsError("proxy", f"one of {list(get_args(ProxyKind))}", self.proxy)
        if self.proxy == "none":
            return
        if self.tune not in PROXY_TUNED:
            limit = f"one of {list(PROXY_TUNED)} for a proxy: it is put into the backbone"
            raise SplitSettingsError("tune", limit, self.tune)
        if self.prompt_at == "cut" or self.prompt_depth == "deep":
            limit = "'none' where prompts join anywhere but at the input alone"
            raise SplitSettingsError("proxy", limit, self.proxy)

    @property
    def tunes_ahead(self) -> bool:
        """Whether anything ahead of the body is tuned: nobody else needs the gradient there."""
        return self.tune in HEAD_TUNED or (self.prompt_count > 0 and self.prompt_at == "input")

    def untuned(self) -> "SplitSettings":
        """The same cut with nothing of head and body tuned."""
        return dataclasses.replace(self, tune="tail", tune_body=False)

    def to_dict(self) -> dict[str, Any]:
        """The settings as values that JSON and msgpack can carry."""
        values = dataclasses.asdict(self)
        values["model_overrides"] = [list(pair) for pair in self.model_overrides]
        if not self.tune_body:
            del values["tune_body"]  # files of other runs stay as they were, byte for byte
        return values

    @classmethod
    def of(cls, model: ModelPlan) -> "SplitSettings":
        """The part of a run's settings that shapes the model."""
        return cls(
            backbone=model.backbone,
            image_size=model.image_size,
            cut=model.cut,
            tail_blocks=model.tail_blocks,
            num_classes=model.num_classes,
            prompt_at=model.prompt_at,
            prompt_depth=model.prompt_depth,
            prompt_count=model.prompt_count,
            keep_tokens=model.keep_tokens,
            tune=model.tune,
            adapter_width=model.adapter_width,
            tune_body=model.tune_body,
            lora_rank=model.lora_rank,
            lora_ends=model.lora_ends,
            proxy=model.proxy,
            proxy_ends=model.proxy_ends,
            proxy_width=model.proxy_width,
            proxy_blocks=model.proxy_blocks,
            local_body=model.local_body,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SplitSettings":
        """The inverse of `to_dict`. Raises `SplitSettingsError`, also for an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise SplitSettingsError(str(name), f"one of {sorted(known)}", name)
        return cls(**cast(dict[str, Any], dict(values)))


def _overrides(pairs: object) -> tuple[tuple[str, Any], ...]:
    limit = "pairs of a name and a plain value"
    if not isinstance(pairs, (tuple, list)):
        raise SplitSettingsError("model_overrides", limit, pairs)
    result = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise SplitSettingsError("model_overrides", limit, pair)
        if pair[0] in _RESERVED_OVERRIDES:
            raise SplitSettingsError("model_overrides", "free of reserved names", pair[0])
        result.append((pair[0], _plain(pair[1])))
    return tuple(result)


def _plain(value: object) -> object:
    # Lists become tuples, so that settings stay hashable after a trip through JSON.
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SplitSettingsError("model_overrides", "plain values (numbers, strings, lists)", value)
