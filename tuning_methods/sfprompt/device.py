"""The device's side of SFPrompt as published: a small local body for the local-loss update."""

from __future__ import annotations

from torch import Tensor

from edge_client.method import DeviceMethod
from edge_client.model import DeviceModel
from tuning_methods.sfprompt.local_body import LocalBody, build_local_body


class SFPromptPaperDevice(DeviceMethod):
    """The local-loss update runs through the local body, if the run has one."""

    def __init__(self) -> None:
        self._model: DeviceModel | None = None
        self._local_body: LocalBody | None = None

    def local_forward(self, model: DeviceModel, smashed: Tensor) -> Tensor:
        body = self.local_body(model)
        return super().local_forward(model, smashed if body is None else body(smashed))

    def local_body(self, model: DeviceModel) -> LocalBody | None:
        """Return the model's frozen local body, built once per model; None: the run has none.

        Raises:
            WeightsMismatchError: the head file's tensors do not fit.
        """
        if self._model is not model:
            settings = model.head.settings
            self._local_body = (
                build_local_body(settings, model.extras) if settings.local_body else None
            )
            self._model = model
        return self._local_body
