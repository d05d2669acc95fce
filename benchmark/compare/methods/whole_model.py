"""Federated methods whose devices hold the whole model."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmark.compare.methods.method import Changes, Method, changed
from protocol.forms import Form
from protocol.settings import BackboneSettings, RunSettings, WireSettings
from split_model import Anatomy, SplitSettings, anatomy
from split_model.model_errors import model_errors


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

    def settings(self, base: RunSettings) -> RunSettings:
        with model_errors():
            sizes = anatomy(SplitSettings.of(_bare(base.model)))
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
                "wire": WireSettings().model_dump(),
            },
        )

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        """What the method adds to the pretrained model, as settings of the model."""
        return {}

    def costed(self, settings: RunSettings) -> RunSettings:
        # The calculator knows what these methods tune; of the model it asks for the backbone.
        return settings.model_copy(update={"model": _bare(settings.model)})


def _bare(model: BackboneSettings) -> BackboneSettings:
    return BackboneSettings(
        backbone=model.backbone,
        image_size=model.image_size,
        num_classes=model.num_classes,
        prompt_count=0,
        cut=0,
    )
