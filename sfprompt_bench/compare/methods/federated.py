"""Federated full fine-tuning."""

from __future__ import annotations

from typing import Any, ClassVar

from protocol.plan import ModelPlan, ProxyKind, RunPlan, WirePlan
from protocol.presets import Form
from sfprompt_bench.compare.methods.base import Changes, Method, changed
from split_model import Anatomy, anatomy


class WholeModel(Method):
    """A cut behind the last block: what is trained is trained on the device, nothing is split.

    The local-loss update, head to tail, is the whole training of a round: `local_epochs` passes
    over all samples, 1 unless the comparison says otherwise.

    Attributes:
        tuned: what of the model is trained, as ``model.tune`` names it.
    """

    form: ClassVar[Form] = "paper"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8}}
    tuned: ClassVar[str]

    def settings(self, base: RunPlan) -> RunPlan:
        sizes = anatomy(_bare(base.model))
        model = {
            "proxy": "none",
            "local_body": 0,
            "cut": sizes.depth,
            "tail_blocks": 0,
            "keep_tokens": 0,
            "tune": self.tuned,
            "prompt_at": "input",
            "prompt_depth": "shallow",
            "prompt_count": 0,
        }
        return changed(
            base,
            {
                "model": model | self.added(sizes),
                "training": {
                    "split_epochs": 0,
                    "keep_fraction": 1.0,
                    "local_learning_rate_scale": 1.0,
                },
                "wire": WirePlan().model_dump(),
            },
        )

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        """What the method adds to the pretrained model, as settings of the model."""
        return {}

    def costed(self, settings: RunPlan) -> RunPlan:
        # The calculator knows what these methods tune; of the model it asks for the backbone.
        return settings.model_copy(update={"model": _bare(settings.model)})


def _bare(model: ModelPlan) -> ModelPlan:
    return ModelPlan(
        backbone=model.backbone,
        image_size=model.image_size,
        num_classes=model.num_classes,
        prompt_count=0,
        cut=0,
    )


class FullFineTuning(WholeModel):
    """FedAvg of the whole model (arXiv 1602.05629)."""

    name = "fl-full"
    what = "federated full fine-tuning: every weight is trained on the device and averaged"
    costed_as = "fl-full"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 5e-5}}
    tuned = "full"


_NARROWING = 8  # 96 of 768 in ViT-B


class FedPeftAdapter(WholeModel):
    """FedPEFT-Adapter (arXiv 2210.01708): one bottleneck for all blocks, and the classifier."""

    name = "fedpeft-adapter"
    what = "FedPEFT: one bottleneck behind every block, and the classifier"
    costed_as = "fedpeft-adapter"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 1e-3}}
    tuned = "adapter"

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        return {"adapter_width": max(1, sizes.width // _NARROWING)}


class FedPeftBias(WholeModel):
    """FedPEFT-Bias (arXiv 2210.01708): every bias of the model, and the classifier."""

    name = "fedpeft-bias"
    what = "FedPEFT: all biases and the classifier"
    costed_as = "fedpeft-bias"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 2e-3}}
    tuned = "bias"


class FedPeftHead(WholeModel):
    """FedPEFT's head-tuning (arXiv 2210.01708): the classifier, on frozen features."""

    name = "fedpeft-head"
    what = "FedPEFT: the classifier alone, the whole frozen model on the device"
    costed_as = "fedpeft-head"
    tuned = "classifier"


_PROMPTS = 10  # ahead of each block, whatever the run's own prompts are


class FedPeftPrompt(WholeModel):
    """FedPEFT-Prompt (arXiv 2210.01708): VPT-Deep (arXiv 2203.12119), and the classifier."""

    name = "fedpeft-prompt"
    what = "FedPEFT: ten prompts ahead of every block, and the classifier"
    costed_as = "fedpeft-prompt"
    recipe: ClassVar[Changes] = {
        "training": {
            "batch_size": 8,
            "prompt_learning_rate": 2e-3,
            "tail_learning_rate": 1e-2,
        }
    }
    tuned = "classifier"

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        return {"prompt_depth": "deep", "prompt_count": _PROMPTS}


class Proxied(WholeModel):
    """The whole proxy is the head; what was tuned on it is put into the backbone.

    It is the backbone's accuracy that a comparison shows; devices measure the proxy's.

    Attributes:
        proxy: its kind, as ``model.proxy`` names it.
    """

    proxy: ClassVar[ProxyKind]
    tuned = "lora"

    def settings(self, base: RunPlan) -> RunPlan:
        proxied = super().settings(base)
        uncut = proxied.model.model_copy(update={"cut": 0})
        depth = anatomy(uncut).depth
        return changed(proxied, {"model": {"cut": depth} | self.chosen(base)})

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        return {"proxy": self.proxy}

    def chosen(self, base: RunPlan) -> dict[str, int]:
        """Which blocks are tuned, as settings of the model."""
        return {"lora_ends": 0}

    def costed(self, settings: RunPlan) -> RunPlan:
        return settings


class FedPft(Proxied):
    """FedPFT (arXiv 2404.11536): LoRA on a proxy whose MLPs are pruned and distilled beforehand.

    Every block stays; LoRA of rank 8 is on the queries and values of all of them, and the
    classifier is tuned. After every tenth round, but not the last, the half of the neurons that
    the devices use least is distilled again.
    """

    name = "fedpft"
    what = (
        "FedPFT: LoRA on a proxy with pruned MLPs, distilled ahead and again every 10 rounds; its "
        "accuracy in the backbone"
    )
    costed_as = "fedpft"
    proxy: ClassVar[ProxyKind] = "pruned"
    recipe: ClassVar[Changes] = {
        "model": {"proxy": "pruned"},
        "training": {"batch_size": 8, "tail_learning_rate": 2e-3},
        "distillation": {"epochs": 5, "every": 10},
    }


class OffsiteTuning(Proxied):
    """Offsite-tuning (arXiv 2302.04870): the blocks at both ends are tuned, others dropped evenly.

    The adapters are the first and the last blocks, here by LoRA on their queries and values, and
    the classifier; the emulator between them is the backbone's blocks, fewer, and not distilled.
    """

    name = "offsite-tuning"
    what = "offsite-tuning: LoRA on the end blocks, fewer blocks between; accuracy in the backbone"
    costed_as = "offsite-tuning"
    proxy: ClassVar[ProxyKind] = "dropped"
    recipe: ClassVar[Changes] = {
        "model": {"proxy": "dropped"},
        "training": {"batch_size": 8, "tail_learning_rate": 2e-3},
    }

    def chosen(self, base: RunPlan) -> dict[str, int]:
        return {"lora_ends": base.model.proxy_ends}
