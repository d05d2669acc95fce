"""The plan of a run: the resolved settings that server and devices execute.

People write `protocol.settings.RunSettings`; the tuning method builds a `RunPlan` from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from protocol.base import Message
from protocol.combinations import list_refusals
from protocol.federation import FederationSettings
from protocol.labels import SHARED
from protocol.parts import BackboneSettings, ClassName, Text, TrainingSettings, WireSettings

__all__ = [
    "ModelPlan",
    "PromptDepth",
    "PromptPlacement",
    "PruningScore",
    "RunPlan",
    "TrainingPlan",
    "Tuned",
    "WirePlan",
]


PromptPlacement = Literal["input", "cut"]

PromptDepth = Literal["shallow", "deep"]

PruningScore = Literal["el2n", "grand", "margin", "loss", "random"]

BodyTuning = Literal["none", "layernorm", "bias", "lora"]

Tuned = Literal["tail", "classifier", "bias", "adapter", "lora", "full"]


class ModelPlan(BackboneSettings):
    """The pretrained model, where it is cut, and which of its parameters are tuned.

    Limits that depend on the architecture, such as the largest `cut`, are checked when the model is
    built.
    """

    # pydantic below 2.10 reserves every name that begins with `model_`.
    model_config = ConfigDict(protected_namespaces=())

    cut: int = Field(1, ge=0, le=256, description="number of blocks in the head")
    tail_blocks: int = Field(
        0, ge=0, le=256, description="number of last blocks that belong to the tail"
    )
    keep_tokens: int = Field(
        0,
        ge=0,
        le=65_536,
        description="image tokens that remain after merging at the cut; 0: no merging",
    )
    prompt_at: PromptPlacement = "input"
    prompt_depth: PromptDepth = "shallow"
    prompt_count: int = Field(10, ge=0, le=1024, description="number of soft prompt tokens")
    prompt_init: Literal["normal", "mean-token"] = "normal"
    tune: Tuned = Field(
        "tail",
        description="tuned parameters in addition to the prompts: tail | classifier: the tail's "
        "last layer | bias: all biases on the device, and the classifier | adapter: a bottleneck "
        "after each block of the head, and the classifier | lora: a low-rank change of queries and "
        "values in the blocks on the device, and the classifier | full: head and tail",
    )
    adapter_width: int = Field(96, ge=1, le=4096, description="inner width (tune = adapter)")
    tune_body: bool = Field(
        False,
        description="tune the body too: in a round each participant has its own copy of the body "
        "on the server, and the copies are averaged (tune = full, prompt_count = 0)",
    )
    lora_rank: int = Field(
        8, ge=1, le=1024, description="rank of each low-rank change (tune = lora)"
    )
    lora_ends: int = Field(
        0,
        ge=0,
        le=256,
        description="number of changed blocks at either end; 0: all blocks (tune = lora)",
    )
    blocks: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field(
        (),
        max_length=256,
        description="ascending numbers of the backbone's blocks in the model; empty: all",
    )
    mlp_widths: tuple[Annotated[int, Field(ge=0, le=65_536)], ...] = Field(
        (),
        max_length=256,
        description="MLP width of each of these blocks; 0: as in the backbone; empty: all as there",
    )
    depths: int = Field(
        0,
        ge=0,
        le=64,
        description="number of evenly spaced blocks of the body whose outputs the tail reads; the "
        "tail is fitted in closed form in round 0; 0: the tail reads the last output, and there "
        "is no round 0",
    )
    rank: int = Field(
        0,
        ge=0,
        le=65_536,
        description="number of principal components of these outputs that the tail reads; 0: all",
    )
    model_overrides: tuple[tuple[str, Any], ...] = Field(
        (),
        exclude=True,  # it is never sent
        repr=False,
        description="further arguments of timm.create_model, only for tests",
    )

    @property
    def tunes_head(self) -> bool:
        """Whether parameters of the head are tuned."""
        return self.tune in ("bias", "adapter", "lora", "full")

    @property
    def tunes_ahead(self) -> bool:
        """Whether parameters before the body are tuned, so that the device needs a gradient."""
        return self.tunes_head or (self.prompt_count > 0 and self.prompt_at == "input")

    @property
    def is_reshaped(self) -> bool:
        """Whether the plan selects blocks or widths, so that the backbone's weights may not fit."""
        return bool(self.blocks or self.mlp_widths)

    def replace(self, **changes: Any) -> ModelPlan:
        """Return the plan with changed fields, validated (`model_copy` does not validate).

        Raises:
            pydantic.ValidationError: the changed plan breaks a limit.
        """
        return ModelPlan.model_validate({**dict(self), **changes})

    def untuned(self) -> ModelPlan:
        """Return the plan without tuned parameters in head and body."""
        return self.replace(tune="tail", tune_body=False)

    @field_validator("model_overrides")
    @classmethod
    def _check_overrides(cls, pairs: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
        # Other fields set these arguments, or they would make timm load other weights.
        reserved = (
            {"img_size", "num_classes", "in_chans", "pretrained", "pretrained_cfg", "device"}
            | {"checkpoint_path", "pretrained_cfg_overlay", "features_only", "use_naflex"}
            | {"cache_dir", "dtype"}
        )

        def plain(value: object) -> object:
            if isinstance(value, (tuple, list)):  # a tuple is hashable
                return tuple(plain(item) for item in value)
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise ValueError(f"must be numbers, strings or lists of them, not {value!r}")

        for name, _ in pairs:
            if name in reserved:
                raise ValueError(f"must not contain the reserved name {name}")
        return tuple((name, plain(value)) for name, value in pairs)

    @model_validator(mode="after")
    def _check_prompts(self) -> ModelPlan:
        if self.prompt_depth == "deep" and self.prompt_at == "input" and self.cut == 0:
            self._refuse("prompt_depth", "shallow where prompt_at = input and cut = 0")
        if self.keep_tokens and self.prompt_at == "input":
            self._refuse("keep_tokens", "0 where prompt_at = input: prompts are not merged")
        return self

    @model_validator(mode="after")
    def _check_depths(self) -> ModelPlan:
        if self.rank and not self.depths:
            self._refuse("rank", "0 where depths = 0")
        if not self.depths:
            return self
        if self.tail_blocks:
            self._refuse("tail_blocks", "0 where depths is above 0: the tail is linear")
        if self.tune not in ("tail", "classifier"):
            self._refuse("depths", "0 unless only prompts and the tail are tuned")
        return self

    @model_validator(mode="after")
    def _check_tune(self) -> ModelPlan:
        if self.tunes_head and self.prompt_at == "cut":
            self._refuse("tune", "tail or classifier where prompt_at = cut: a frozen head")
        if self.tune == "adapter" and self.cut == 0:
            self._refuse("tune", "any value but adapter where cut = 0")
        if self.tune_body and self.tune != "full":
            self._refuse("tune_body", "false unless tune = full")
        if self.tune_body and self.prompt_count:
            self._refuse("tune_body", "false unless prompt_count = 0")
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> ModelPlan:
        if list(self.blocks) != sorted(set(self.blocks)):
            self._refuse("blocks", "ascending, each number once")
        if self.blocks and self.mlp_widths and len(self.blocks) != len(self.mlp_widths):
            self._refuse("mlp_widths", f"empty or one width for each of {len(self.blocks)} blocks")
        return self

    def _refuse(self, field: str, limit: str) -> NoReturn:
        value = getattr(self, field)
        error = PydanticCustomError(
            "combination",
            "{name} must be {expected}, not {value}",
            {"name": field, "expected": limit, "value": str(value)},
        )
        details = InitErrorDetails(type=error, loc=(field,), input=value)
        raise ValidationError.from_exception_data("ModelPlan", [details])


class TrainingPlan(TrainingSettings):
    """Optimisation, and the phases of a round on a device.

    Source: SFPrompt (arXiv 2407.17533, section 3).
    """

    keep_fraction: float = Field(
        0.5, gt=0, le=1, description="share of a device's samples selected for split training"
    )
    pruning: PruningScore = "el2n"
    prune_per_class: bool = Field(False, description="select the same share of each class")
    local_epochs: int = Field(
        1,
        ge=0,
        le=10_000,
        description="epochs of the local-loss update with head and tail; with depths above 0, "
        "steps of the classifier on the features of round 0",
    )
    split_epochs: int = Field(
        1,
        ge=0,
        le=10_000,
        description="epochs of training through the server; 0: only the local-loss update",
    )
    local_learning_rate_scale: float = Field(
        1.0, ge=0, le=100, description="factor of both learning rates in the local-loss update"
    )
    server_tuning: BodyTuning = Field(
        "none", description="what the server tunes of its body before round 0, on shared labels"
    )
    server_epochs: int = Field(
        4, ge=1, le=10_000, description="epochs of this over all participants' samples"
    )
    server_learning_rate: float = Field(
        1e-3, gt=0, le=100, description="learning rate of this; AdamW, falling as a cosine"
    )


class WirePlan(WireSettings):
    """The tensors that are sent in a round, and their codecs."""

    keep_smashed: bool = Field(
        False,
        description="send each sample's smashed data once; the server caches it (prompt_at = cut)",
    )
    gradient_correction: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="factor of the codec's error of the smashed data, which is added to their "
        "gradient (prompt_at = input)",
    )


class RunPlan(Message):
    """The complete plan of a run. Equal plans and equal data give equal results."""

    name: Text = "run"
    seed: int = Field(0, ge=0, lt=2**63)
    class_names: tuple[ClassName, ...] | None = Field(
        None, description="names of the classes, in the order of the labels"
    )
    model: ModelPlan = ModelPlan()
    federation: FederationSettings = FederationSettings()
    training: TrainingPlan = TrainingPlan()
    wire: WirePlan = WirePlan()
    method: dict[str, Any] = Field(
        {}, description="fields of the tuning method, which only its own code reads"
    )

    @property
    def first_round(self) -> int:
        """The number of the run's first round: 0 with a closed-form start, else 1."""
        return 0 if self.model.depths else 1

    @property
    def shares_labels(self) -> bool:
        """Whether devices send their labels, so that the server tunes and evaluates alone."""
        return self.training.labels == SHARED

    @property
    def selects_states(self) -> bool:
        """Whether devices report a loss by which the server selects the best state.

        With a validation share it is that of these images. A classifier that is only refined after
        a closed-form start has none: each honest round lowers the loss that it is fitted to.
        """
        refines = self.model.depths and not self.training.split_epochs
        return self.federation.keep_best and bool(refines or self.training.validation_share)

    @model_validator(mode="after")
    def _check_combinations(self) -> RunPlan:
        for refused, message in list_refusals(self):
            if refused:
                raise ValueError(message)
        return self
