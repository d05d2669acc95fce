"""The device's side of SFPrompt as published: a local body, and deltas of smashed data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edge_client.method import DeviceMethod
from edge_client.torch_model import TorchModel, model_of
from edge_client.training.context import RoundContext
from edge_client.training.split_training import Sample
from edge_client.transport.split_client import SamplesMissing, SplitPlane
from protocol.plan import RunPlan
from tuning_methods.sfprompt.device_deltas import DeltaCache
from tuning_methods.sfprompt.local_body import LocalBody, build_local_body
from tuning_methods.sfprompt.settings import paper_part


class SFPromptPaperDevice(DeviceMethod):
    """Updates locally through the local body, and sends deltas, if the run has these."""

    def __init__(self) -> None:
        self._model: TorchModel | None = None
        self._local_body: LocalBody | None = None
        self._deltas: DeltaCache | None = None

    def local_forward(self, context: RoundContext, smashed: Tensor) -> Tensor:
        body = self.local_body(context)
        return super().local_forward(context, smashed if body is None else body(smashed))

    def local_body(self, context: RoundContext) -> LocalBody | None:
        """Return the model's frozen local body, built once per model; None: the run has none.

        Raises:
            WeightsMismatchError: the head file's tensors do not fit.
        """
        model = model_of(context)
        if self._model is not model:
            num_blocks, settings = paper_part(context.run).local_body, model.head.settings
            self._local_body = (
                build_local_body(settings, num_blocks, model.extras) if num_blocks else None
            )
            self._model = model
        return self._local_body

    def forward(
        self,
        context: RoundContext,
        plane: SplitPlane,
        samples: Sequence[Sample],
        smashed: Tensor,
        step: str,
    ) -> tuple[Tensor, Tensor | None]:
        cache = self.delta_cache(context.run, context.cache_bytes)
        if cache is None:
            return super().forward(context, plane, samples, smashed, step)
        batch = cache.encode(samples, smashed)
        try:
            features = plane.forward_payload(
                batch.tensors, len(batch), step=step, round_=context.round
            )
        except SamplesMissing as error:
            cache.forget(samples[place] for place in error.places)
            raise
        cache.confirm(batch)
        return torch.from_numpy(features), batch.decoded

    def uses_fixed_views(self, run: RunPlan) -> bool:
        """With deltas: a sample has a cached copy for each of its views."""
        return paper_part(run).delta_smashed is not None

    def drop_sample_caches(self) -> None:
        self._deltas = None

    def delta_cache(self, run: RunPlan, max_bytes: int) -> DeltaCache | None:
        """Return the cache of the samples' smashed data; None: the run sends them whole."""
        part = paper_part(run)
        if self._deltas is None and part.delta_smashed is not None:
            whole = run.wire.smashed
            self._deltas = DeltaCache(whole, part.delta_smashed, part.skip_below, max_bytes)
        return self._deltas
