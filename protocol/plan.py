"""What a run is made of: the model's cut, the federation, the training and the wire.

The server keeps these settings for the length of the run and hands them to every participant, so
that a device needs to be told nothing but where the server is and where its data lie.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from protocol.base import Message
from protocol.codec_names import check_float_codec, is_row_wise_inside
from protocol.distillation import DistillationSettings
from protocol.errors import UnknownCodec
from protocol.federation import FederationSettings, ServerOptimizer

__all__ = [
    "CodecName",
    "DistillationSettings",
    "FederationSettings",
    "Message",
    "ModelPlan",
    "PromptDepth",
    "PromptPlacement",
    "ProxyKind",
    "RunPlan",
    "ServerOptimizer",
    "Text",
    "TrainingPlan",
    "Tuned",
    "WirePlan",
]

Text = Annotated[str, Field(min_length=1, max_length=200)]

PromptPlacement = Literal["input", "cut"]

PromptDepth = Literal["shallow", "deep"]

ProxyKind = Literal["none", "pruned", "dropped"]

Tuned = Literal["tail", "classifier", "bias", "adapter", "lora", "full"]


def _known_codec(name: str) -> str:
    try:
        return check_float_codec(name)
    except UnknownCodec as error:
        limit = error.limit if isinstance(error.limit, list) else [str(error.limit)]
        raise PydanticCustomError(
            "unknown_codec", "{reason}", {"reason": error.message, "expected": ", ".join(limit)}
        ) from error


CodecName = Annotated[str, AfterValidator(_known_codec)]


class ModelPlan(Message):
    """The pretrained model, its cut, its prompts, and what is tuned of it.

    Limits that need the architecture (the largest `cut`, say) are checked when it is built.
    """

    # pydantic below 2.10 reserves every name that begins with `model_`.
    model_config = ConfigDict(protected_namespaces=())

    backbone: Text = Field("vit_small_patch14_dinov2", description="timm's name of the model")
    weights: Text = Field(
        "packaged",
        description="packaged | hub | file:PATH (on the server) | random:SEED (untrained)",
    )
    image_size: int = Field(56, ge=8, le=2048, description="pixels a side")
    cut: int = Field(1, ge=0, le=256, description="blocks in the head")
    tail_blocks: int = Field(0, ge=0, le=256, description="last blocks that belong to the tail")
    num_classes: int = Field(10, ge=2, le=100_000)
    keep_tokens: int = Field(
        0, ge=0, le=65_536, description="image tokens that cross the cut, merged; 0: all"
    )
    prompt_at: PromptPlacement = "input"
    prompt_depth: PromptDepth = "shallow"
    prompt_count: int = Field(10, ge=0, le=1024, description="soft prompt tokens")
    prompt_init: Literal["normal", "mean-token"] = "normal"
    tune: Tuned = Field(
        "tail",
        description="in addition to the prompts: tail | classifier, the tail's last layer | bias, "
        "all biases on the device, and the classifier | adapter, one bottleneck behind each "
        "block of the head, and the classifier | lora, a low-rank change of queries and "
        "values in the blocks on the device, and the classifier | full, head and tail",
    )
    adapter_width: int = Field(96, ge=1, le=4096, description="inner width (tune = adapter)")
    tune_body: bool = Field(
        False,
        description="tune the body too: in a round each participant has its own copy on the "
        "server, and the copies are averaged (tune = full, prompt_count = 0)",
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="rank of each change (tune = lora)")
    lora_ends: int = Field(
        0, ge=0, le=256, description="changed blocks at either end; 0: all blocks (tune = lora)"
    )
    proxy: ProxyKind = Field(
        "none",
        description="the run's model is a smaller one made from the backbone: pruned, with fewer "
        "neurons in the MLPs, or dropped, with fewer blocks",
    )
    proxy_ends: int = Field(
        1, ge=0, le=128, description="blocks at either end that a proxy leaves unchanged"
    )
    proxy_width: int = Field(
        0, ge=0, le=65_536, description="neurons of the other MLPs (proxy = pruned); 0: a quarter"
    )
    proxy_blocks: int = Field(
        0, ge=0, le=256, description="number of blocks left (proxy = dropped); 0: half"
    )
    local_body: int = Field(
        0,
        ge=0,
        le=256,
        description="blocks of a small frozen body that the local update runs through on the "
        "device; 0: from head straight to tail",
    )
    model_overrides: tuple[tuple[str, Any], ...] = Field(
        (),
        exclude=True,  # runs never carry it
        repr=False,
        description="further arguments of timm.create_model, for tests alone",
    )

    @property
    def tunes_head(self) -> bool:
        """Whether parameters of the head are tuned."""
        return self.tune in ("bias", "adapter", "lora", "full")

    @property
    def tunes_ahead(self) -> bool:
        """Whether anything ahead of the body is tuned, so that the device needs its gradient."""
        return self.tunes_head or (self.prompt_count > 0 and self.prompt_at == "input")

    def replace(self, **changes: Any) -> ModelPlan:
        """The plan with some fields changed, validated again (`model_copy` does not validate).

        Raises:
            pydantic.ValidationError: the changed plan breaks a limit.
        """
        return ModelPlan.model_validate({**dict(self), **changes})

    def untuned(self) -> ModelPlan:
        """The plan with nothing of head and body tuned."""
        return self.replace(tune="tail", tune_body=False)

    @field_validator("model_overrides")
    @classmethod
    def _check_overrides(cls, pairs: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
        # The other fields settle these, or timm would load weights of its choice.
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
                raise ValueError(f"must be free of reserved names, not {name}")
        return tuple((name, plain(value)) for name, value in pairs)

    @model_validator(mode="after")
    def _check_prompts(self) -> ModelPlan:
        if self.prompt_depth == "deep" and self.prompt_at == "input" and self.cut == 0:
            self._refuse("prompt_depth", "shallow where model.prompt_at = input and model.cut = 0")
        if self.keep_tokens and self.prompt_at == "input":
            self._refuse("keep_tokens", "0 where model.prompt_at = input: prompts are not merged")
        return self

    @model_validator(mode="after")
    def _check_tune(self) -> ModelPlan:
        if self.tunes_head and self.prompt_at == "cut":
            self._refuse("tune", "tail or classifier where model.prompt_at = cut: a frozen head")
        if self.tune == "adapter" and self.cut == 0:
            self._refuse("tune", "any value but adapter where model.cut = 0")
        if self.tune_body and self.tune != "full":
            self._refuse("tune_body", "false unless model.tune = full")
        if self.tune_body and self.prompt_count:
            self._refuse("tune_body", "false unless model.prompt_count = 0")
        return self

    @model_validator(mode="after")
    def _check_proxy(self) -> ModelPlan:
        if self.local_body and (self.prompt_at == "cut" or self.proxy != "none"):
            self._refuse("local_body", "0 unless model.prompt_at = input and model.proxy = none")
        if self.proxy == "none":
            return self
        if self.tune not in ("tail", "classifier", "lora"):
            self._refuse("tune", "tail, classifier or lora where model.proxy is not none")
        if self.prompt_at != "input" or self.prompt_depth != "shallow":
            limit = "none unless model.prompt_at = input and model.prompt_depth = shallow"
            self._refuse("proxy", limit)
        return self

    def _refuse(self, field: str, limit: str) -> NoReturn:
        value = getattr(self, field)
        error = PydanticCustomError(
            "combination",
            "model.{name} must be {expected}, not {value}",
            {"name": field, "expected": limit, "value": str(value)},
        )
        details = InitErrorDetails(type=error, loc=(field,), input=value)
        raise ValidationError.from_exception_data("ModelPlan", [details])


class TrainingPlan(Message):
    """The three phases of a round on a device (SFPrompt, arXiv 2407.17533, section 3)."""

    keep_fraction: float = Field(
        0.5, gt=0, le=1, description="share of a device's samples kept for split training"
    )
    pruning: Literal["el2n", "grand", "margin", "loss", "random"] = "el2n"
    prune_per_class: bool = Field(False, description="keep the same share of every class")
    local_epochs: int = Field(1, ge=0, le=10_000, description="local-loss update, head to tail")
    split_epochs: int = Field(
        1, ge=0, le=10_000, description="through the server; 0: the local-loss update is all"
    )
    batch_size: int = Field(32, ge=1, le=4096)
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    prompt_learning_rate: float = Field(5e-3, ge=0, le=100)
    tail_learning_rate: float = Field(2e-3, ge=0, le=100)
    local_learning_rate_scale: float = Field(
        1.0, ge=0, le=100, description="factor on both rates during the local-loss update"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="Nesterov's momentum, of sgd")
    weight_decay: float = Field(0.0, ge=0, le=10)
    proximal: float = Field(
        0.0, ge=0, le=100, description="FedProx's mu: pull to the round's global state"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="of the learning rates over the rounds of the run"
    )
    warmup_rounds: int = Field(0, ge=0, le=10_000)
    augment: bool = False
    views: int = Field(
        4, ge=1, le=1000, description="augmented views of a sample whose smashed data are kept"
    )

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> TrainingPlan:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer = sgd and a momentum above 0")
        return self


class WirePlan(Message):
    """What crosses the wire, and the codec of each kind of tensor."""

    smashed: CodecName = "float32"
    features: CodecName = "float32"
    gradients: CodecName = "float32"
    inference: CodecName = Field(
        "float32", description="features of evaluation and prediction: rounding them costs accuracy"
    )
    updates: CodecName = Field("float32", description="tail and prompts from a device")
    update_deltas: bool = Field(
        False, description="send a state as its change against the round's, both ways"
    )
    head: Literal["float32", "float16", "int8"] = Field(
        "float32", description="the frozen head's weights, downloaded once"
    )
    keep_smashed: bool = Field(
        False,
        description="send a sample's smashed data once; the server keeps it (prompt_at = cut)",
    )
    delta_smashed: CodecName | None = Field(
        None,
        description="codec of the change of a sample's smashed data since its last visit; none: "
        "they are sent whole (prompt_at = input)",
    )
    skip_below: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="a relative change (L2) of a sample below this is not sent (delta_smashed)",
    )
    gradient_correction: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="times what the codecs leave out of smashed data is added to their gradient "
        "(prompt_at = input)",
    )
    pooled_features: bool = Field(
        False, description="return only the tokens that the tail reads, where it reads the first"
    )
    stochastic_rounding: bool = Field(
        False, description="of the gradients, where their codec rounds"
    )


class RunPlan(Message):
    """Everything that defines a run. Two runs with equal settings and data give equal results."""

    name: Text = "run"
    seed: int = Field(0, ge=0, lt=2**63)
    class_names: tuple[Text, ...] | None = Field(None, description="in the order of the classes")
    model: ModelPlan = ModelPlan()
    federation: FederationSettings = FederationSettings()
    training: TrainingPlan = TrainingPlan()
    wire: WirePlan = WirePlan()
    distillation: DistillationSettings = DistillationSettings()

    @model_validator(mode="after")
    def _something_is_distilled(self) -> RunPlan:
        smaller = self.model.proxy != "none" or self.model.local_body
        if self.distillation.epochs and not smaller:
            raise ValueError("distillation.epochs needs a model.proxy or a model.local_body")
        if self.distillation.every:
            self.distillation.check_neurons(self.model.proxy, self.federation.dp_clip)
        if self.model.local_body and not self.training.local_epochs:
            raise ValueError("model.local_body needs training.local_epochs above 0")
        return self

    @model_validator(mode="after")
    def _one_name_per_class(self) -> RunPlan:
        names = self.class_names
        if names is not None and len(names) != self.model.num_classes:
            raise ValueError(
                f"class_names has {len(names)} names for num_classes {self.model.num_classes}"
            )
        return self

    @model_validator(mode="after")
    def _prompts_at_the_cut_are_some(self) -> RunPlan:
        if self.model.prompt_at == "cut" and self.model.prompt_count == 0:
            raise ValueError(
                "model.prompt_at = cut needs a model.prompt_count above 0: the server has nothing "
                "else to tune"
            )
        return self

    @model_validator(mode="after")
    def _kept_smashed_data_are_constant(self) -> RunPlan:
        if not self.wire.keep_smashed:
            return self
        if self.model.prompt_at != "cut":
            raise ValueError(
                "wire.keep_smashed needs model.prompt_at = cut: prompts at the input change the "
                "smashed data in every step"
            )
        if not is_row_wise_inside(self.wire.smashed):
            raise ValueError(
                f"wire.keep_smashed needs a codec that can be taken apart by samples, not "
                f"wire.smashed = {self.wire.smashed}"
            )
        return self

    @model_validator(mode="after")
    def _changes_are_of_smashed_data_that_change(self) -> RunPlan:
        wire = self.wire
        if wire.skip_below and wire.delta_smashed is None:
            raise ValueError("wire.skip_below needs wire.delta_smashed")
        if self.model.prompt_at != "input" and (wire.delta_smashed or wire.gradient_correction):
            raise ValueError(
                "wire.delta_smashed and wire.gradient_correction need model.prompt_at = input: "
                "prompts at the cut leave the smashed data as they are"
            )
        if wire.delta_smashed is None:
            return self
        for name in ("smashed", "delta_smashed"):
            if not is_row_wise_inside(getattr(wire, name)):
                raise ValueError(
                    f"wire.delta_smashed needs codecs that can be taken apart by samples, not "
                    f"wire.{name} = {getattr(wire, name)}"
                )
        return self

    @model_validator(mode="after")
    def _what_shifts_or_pulls_is_on_the_device(self) -> RunPlan:
        if self.training.proximal and self.model.prompt_at == "cut":
            raise ValueError(
                "training.proximal needs model.prompt_at = input: the server does not pull prompts"
            )
        averaged = self.federation.server_optimizer == "fedavg"
        if self.model.prompt_init == "mean-token" and not averaged:
            raise ValueError(
                "model.prompt_init = mean-token needs federation.server_optimizer = fedavg: the "
                "others would take the shift of the first round for a gradient"
            )
        if self.model.prompt_init == "mean-token" and self.federation.dp_clip is not None:
            raise ValueError(
                "model.prompt_init = mean-token does not go with federation.dp_clip, which would "
                "cut off the shift of the first round"
            )
        return self

    @model_validator(mode="after")
    def _a_tuned_body_is_tuned_through_the_server(self) -> RunPlan:
        if not self.model.tune_body:
            return self
        if self.training.split_epochs == 0:
            raise ValueError(
                "model.tune_body needs training.split_epochs above 0: the body would never be tuned"
            )
        if self.training.proximal:
            raise ValueError(
                "training.proximal needs model.tune_body = false: the server does not pull bodies"
            )
        if self.wire.delta_smashed:
            raise ValueError(
                "wire.delta_smashed needs model.tune_body = false: a head that is tuned changes "
                "all smashed data in every step"
            )
        return self

    @model_validator(mode="after")
    def _local_training_alone_is_whole(self) -> RunPlan:
        training = self.training
        if training.split_epochs:
            return self
        without = "training.split_epochs = 0 (no training through the server)"
        if training.local_epochs == 0:
            raise ValueError(f"{without} needs training.local_epochs above 0")
        if training.keep_fraction != 1:
            raise ValueError(
                f"{without} needs training.keep_fraction = 1: the local update takes all samples"
            )
        if training.local_learning_rate_scale != 1:
            raise ValueError(f"{without} needs training.local_learning_rate_scale = 1")
        if self.model.prompt_at == "cut":
            raise ValueError(
                f"{without} needs model.prompt_at = input: prompts at the cut would never be tuned"
            )
        if self.wire.delta_smashed or self.wire.gradient_correction:
            raise ValueError(f"{without} has no smashed data for wire.delta_smashed")
        return self

    @model_validator(mode="after")
    def _what_is_left_out_is_a_change(self) -> RunPlan:
        if self.wire.updates.startswith("topk") and not self.wire.update_deltas:
            raise ValueError(
                "wire.updates = topk needs wire.update_deltas: of whole states it would set most "
                "numbers to 0"
            )
        return self
