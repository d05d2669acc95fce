"""Settings of SFPrompt: the form that runs by default, and the published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field

from protocol.base import Message
from protocol.codec_names import is_row_wise_inside
from protocol.messages import parse_message
from protocol.method import Fields, MethodSettings
from protocol.parts import CodecName
from protocol.plan import BodyTuning, PromptDepth, PruningScore, RunPlan
from tuning_methods.proxies.settings import (
    DistillationSettings,
    check_neurons,
)

if TYPE_CHECKING:
    from protocol.settings import RunSettings

_VALIDATION_SHARE = 0.1  # where prompts are tuned after a closed-form start

_DEPTHS = 4  # of the default form: more add bytes and time, and little accuracy

_MODEL = (
    "cut",
    "tail_blocks",
    "keep_tokens",
    "prompt_depth",
    "prompt_count",
    "prompt_init",
    "tune",
)

_TRAINING = (
    "keep_fraction",
    "pruning",
    "prune_per_class",
    "local_epochs",
    "split_epochs",
    "local_learning_rate_scale",
)


_SERVER = ("server_tuning", "server_epochs", "server_learning_rate")


def _excludes_start(federation: object) -> bool:
    """Whether settings of the federation, as they were written, exclude a closed-form start."""
    given = dict(federation) if isinstance(federation, Mapping | BaseModel) else {}
    private = given.get("dp_clip") is not None
    return private or given.get("server_optimizer", "fedavg") != "fedavg"


class _SplitPrompts(MethodSettings):
    """What both forms share: the cut, the prompts, and the phases of a round."""

    source: ClassVar[str] = "SFPrompt, arXiv 2407.17533"

    cut: int = Field(1, ge=0, le=256, description="blocks in the head, on the device")
    tail_blocks: int = Field(0, ge=0, le=256, description="last blocks that belong to the tail")
    prompt_init: Literal["normal", "mean-token"] = Field(
        "normal", description="random | random, shifted by the mean image token"
    )
    prune_per_class: bool = Field(False, description="select the same share of each class")


class Form(NamedTuple):
    """The fields of `SFPrompt` that depend on each other, all with a value."""

    depths: int
    split_epochs: int
    local_epochs: int
    keep_fraction: float
    prompt_count: int


class SFPrompt(_SplitPrompts):
    """A classifier in closed form, refined in each round; or prompts that the server tunes.

    Smashed data never change and cross once. Round 0 fits a linear classifier of several depths of
    the body, and each later round is one step of it on every device. With ``split_epochs`` the
    server tunes prompts in the body: a step sends features down and their gradient up, in one round
    trip, for a share of the samples that is drawn anew in each round.

    Fields without a value depend on the others; see `form`.
    """

    name: Literal["sfprompt"] = "sfprompt"
    prompt_count: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="soft prompt tokens; none: 10 with split_epochs, else 0",
    )
    split_epochs: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="epochs a round through the server, which tune the prompts; none: 0 after a "
        "closed-form start without prompts, else 1",
    )
    prompt_depth: PromptDepth = Field(
        "deep",
        description="deep: prompts before each block of the body | shallow: before its first",
    )
    keep_tokens: int = Field(
        0, ge=0, le=65_536, description="image tokens that cross the cut, merged; 0: all"
    )
    tune: Literal["tail", "classifier"] = Field("tail", description="in addition to the prompts")
    depths: int | None = Field(
        None,
        ge=0,
        le=64,
        description="blocks of the body, evenly spaced, that a linear tail reads; round 0 fits it "
        "in closed form | 0: the tail reads the last block and is tuned with the prompts | none: 4 "
        "where a closed-form start is possible, else 0",
    )
    rank: int = Field(
        768, ge=1, le=65_536, description="principal components of these blocks' outputs"
    )
    keep_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a device's samples that train in a round; none: 0.8 with "
        "split_epochs, else 1",
    )
    pruning: PruningScore = Field("random", description="how these samples are selected")
    local_epochs: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="local-loss update of the tail: after a closed-form start steps of the "
        "classifier on all samples; none: 1 there without split_epochs, else 0",
    )
    local_learning_rate_scale: float = Field(
        1.0, ge=0, le=100, description="factor on the rates during the local-loss update"
    )
    keep_smashed: bool = Field(
        True, description="send a sample's smashed data once; the server caches them"
    )

    server_tuning: BodyTuning = Field(
        "none",
        description="with training.labels = shared: what the server tunes of its body before round "
        "0, on all samples together, kept only if it helps: none | layernorm: norms | bias: all "
        "biases | lora: low-rank changes of queries and values",
    )
    server_epochs: int = Field(4, ge=1, le=10_000, description="epochs of it")
    server_learning_rate: float = Field(1e-3, gt=0, le=100, description="its learning rate")

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        # At the same bytes, 4-bit gradients of 80 % of the samples, rounded stochastically, are
        # more accurate than 8-bit gradients of 60 %. Without a warm-up round the first steps of
        # fresh prompts are too long. After a closed-form start prompts refine what fits already.
        starts = self.depths != 0 and not _excludes_start(given.get("federation", {}))
        return {
            "training": {
                "batch_size": 8,
                "prompt_learning_rate": 1e-4 if starts else 2e-3,
                "tail_learning_rate": 1e-2,
                "warmup_rounds": 1,
            },
            "wire": {
                # Half the bytes of int4, and closer. Prompts alone were measured with int4.
                "smashed": "klt:0.5" if starts else "int4+zstd",
                "features": "int8",
                "gradients": "int4",
                "stochastic_rounding": True,
                "inference": "float16",
                "start": "int4",
                "updates": "float16",
                "update_deltas": True,
                "head": "int8",
                "pooled_features": True,
            },
        }

    def model_part(self, settings: RunSettings) -> Fields:
        form = self.form(settings)
        read = {"depths": form.depths, "rank": self.rank if form.depths else 0}
        own = {field: getattr(self, field) for field in _MODEL}
        return {"prompt_at": "cut"} | read | own | {"prompt_count": form.prompt_count}

    def training_part(self, settings: RunSettings) -> Fields:
        form = self.form(settings)
        share = settings.training.validation_share
        tunes = form.split_epochs and settings.federation.rounds
        if share is None and form.depths and tunes:
            share = _VALIDATION_SHARE
        return {field: getattr(self, field) for field in (*_TRAINING, *_SERVER)} | {
            "split_epochs": form.split_epochs,
            "local_epochs": form.local_epochs,
            "keep_fraction": form.keep_fraction,
            "validation_share": share,
        }

    def form(self, settings: RunSettings) -> Form:
        """Fill in the fields without a value: those of the form that measures best."""
        depths = self._depths(settings)
        split_epochs = self.split_epochs
        if split_epochs is None:
            split_epochs = int(not depths or self._asks_for_prompts)
        refines = depths and not split_epochs
        return Form(
            depths=depths,
            split_epochs=split_epochs,
            local_epochs=int(bool(refines)) if self.local_epochs is None else self.local_epochs,
            keep_fraction=self.keep_fraction or (0.8 if split_epochs else 1.0),
            prompt_count=self.prompt_count
            if self.prompt_count is not None
            else (10 if split_epochs else 0),
        )

    @property
    def _asks_for_prompts(self) -> bool:
        """Whether a field was given a value that only split training uses."""
        if self.split_epochs is not None:
            return self.split_epochs > 0
        draws = self.keep_fraction is not None and self.keep_fraction < 1
        return bool(self.prompt_count) or draws or self.pruning != "random"

    def _depths(self, settings: RunSettings) -> int:
        """Return the number of depths; by default 0 for what excludes a closed-form start."""
        if self.depths is not None:
            return self.depths
        possible = (
            not self.tail_blocks
            and not (self.local_epochs and self._asks_for_prompts)
            and self.keep_smashed
            and (self.keep_fraction == 1 or self.pruning == "random")
            and settings.wire.pooled_features
            and is_row_wise_inside(settings.wire.start)
            and not _excludes_start(dict(settings.federation))
        )
        return _DEPTHS if possible else 0

    def wire_part(self) -> Fields:
        return {"keep_smashed": self.keep_smashed}


class PaperPart(Message):
    """What the published form adds to a run's plan, as `RunPlan.method`."""

    local_body: int = Field(
        0,
        ge=0,
        le=256,
        description="blocks of a small frozen body for the local-loss update; 0: none",
    )
    distillation: DistillationSettings = Field(
        DistillationSettings(), description="of the local body"
    )
    delta_smashed: CodecName | None = Field(
        None,
        description="codec of a sample's change since its last visit; none: sent whole",
    )
    skip_below: float = Field(
        0.0, ge=0, lt=1, description="relative changes (L2) below this are not sent"
    )


def paper_part(plan: RunPlan) -> PaperPart:
    """Return what the published form adds to a run's plan.

    Raises:
        InvalidField: a field is wrong.
    """
    return parse_message(PaperPart, plan.method)


class SFPromptPaper(PaperPart, _SplitPrompts):
    """SFPrompt as published: prompts at the input, tuned on the device; four tensors a step.

    A round scores samples by EL2N, updates prompts and tail from head straight to tail (or through
    a small local body), then trains through the server.
    """

    name: Literal["sfprompt-paper"] = "sfprompt-paper"
    device: ClassVar[str] = "tuning_methods.sfprompt.device:SFPromptPaperDevice"
    server: ClassVar[str] = "tuning_methods.sfprompt.server:SFPromptPaperServer"
    prompt_count: int = Field(10, ge=0, le=1024, description="soft prompt tokens")
    split_epochs: int = Field(1, ge=0, le=10_000, description="epochs a round through the server")
    prompt_depth: PromptDepth = Field(
        "shallow", description="shallow: prompts at the input | deep: before each block of the head"
    )
    tune: Literal["tail", "classifier", "bias", "adapter", "lora", "full"] = Field(
        "tail", description="in addition to the prompts: of the blocks on the device"
    )
    keep_fraction: float = Field(
        0.5, gt=0, le=1, description="share of a device's samples selected for split training"
    )
    pruning: PruningScore = Field("el2n", description="how these samples are selected")
    # EL2N over all classes together would drop whole classes while the classifier is fresh.
    prune_per_class: bool = Field(True, description="select the same share of each class")
    local_epochs: int = Field(1, ge=0, le=10_000, description="local-loss update")
    local_learning_rate_scale: float = Field(
        0.1, ge=0, le=100, description="factor on both rates during the local-loss update"
    )
    gradient_correction: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="times the error of the smashed data's codec is added to their gradient",
    )

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        # A device makes few steps a round: rates are high, with a warm-up, and batches small.
        return {
            "training": {
                "batch_size": 4,
                "prompt_learning_rate": 1e-2,
                "tail_learning_rate": 2e-2,
                "warmup_rounds": 1,
            }
        }

    def model_part(self, settings: RunSettings) -> Fields:
        shared = {field: getattr(self, field) for field in _MODEL if field != "keep_tokens"}
        return {"prompt_at": "input"} | shared

    def training_part(self, settings: RunSettings) -> Fields:
        return {field: getattr(self, field) for field in _TRAINING}

    def wire_part(self) -> Fields:
        return {"gradient_correction": self.gradient_correction}

    def own_part(self) -> PaperPart:
        return PaperPart(**{field: getattr(self, field) for field in PaperPart.model_fields})

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        for refused, message in _refusals(plan, paper_part(plan)):
            if refused:
                raise ValueError(message)
        check_neurons(plan)


def _refusals(plan: RunPlan, part: PaperPart) -> list[tuple[bool, str]]:
    """Each combination that cannot run: whether the plan has it, and what to change."""
    at_cut, delta = plan.model.prompt_at == "cut", part.delta_smashed
    return [
        (
            bool(part.distillation.epochs) and not part.local_body,
            "method.distillation.epochs needs a local_body",
        ),
        (bool(part.local_body) and at_cut, "local_body needs prompt_at = input"),
        (
            bool(part.local_body) and not plan.training.local_epochs,
            "local_body needs local_epochs above 0",
        ),
        (bool(part.skip_below) and delta is None, "skip_below needs delta_smashed"),
        (
            delta is not None and at_cut,
            "delta_smashed needs prompt_at = input: prompts at the cut leave the smashed data as "
            "they are",
        ),
        (
            delta is not None and plan.training.split_epochs == 0,
            "delta_smashed needs split_epochs above 0: no smashed data are sent",
        ),
        *(
            (
                delta is not None and not is_row_wise_inside(codec),
                f"delta_smashed needs codecs that encode each sample by itself, not {name} = "
                f"{codec}",
            )
            for name, codec in (
                ("wire.smashed", plan.wire.smashed),
                ("delta_smashed", delta or "float32"),
            )
        ),
    ]
