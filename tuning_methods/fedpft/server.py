"""The server's side of FedPFT: distils the least used neurons again, between rounds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from protocol.errors import InvalidField, WrongShape
from protocol.frames import Frame
from protocol.messages import BlobRef
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_model.backbone.tensor_file import write_tensors
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.head_file import write_head_file
from split_model.files import sync_folder
from split_server.method import Rebuild, RebuiltModel
from split_server.payloads.tensors import decode_floats, require_finite
from tuning_methods.proxies.cache import find_image_file, load_images
from tuning_methods.proxies.distillation import redistil_proxy
from tuning_methods.proxies.neurons import NEURONS, neurons_shape
from tuning_methods.proxies.server import ProxyServer
from tuning_methods.proxies.settings import distillation_of


class FedPFTServer(ProxyServer):
    """The run's model is a pruned proxy, distilled before the run and again every few rounds.

    Devices report how often each neuron was inactive; the least used ones are distilled again.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """

    def check(self, plan: RunPlan) -> None:
        super().check(plan)
        if distillation_of(plan).every:
            neurons_shape(plan.model)  # raises if the device does not have the whole proxy

    def extra_shapes(self, plan: RunPlan, round_: int) -> Mapping[str, tuple[int, ...]]:
        if not distillation_of(plan).is_due(round_, plan.federation.rounds):
            return {}
        return {NEURONS: neurons_shape(plan.model)}

    def decode_extras(self, plan: RunPlan, round_: int, frame: Frame) -> dict[str, Tensor]:
        """Decode each neuron's share of inactive tokens, [L, H] in float32.

        Raises:
            WrongShape: the tensor is missing or has another shape.
            NonFinite: it contains NaN or infinity.
            InvalidField: a share is below 0 or above 1.
        """
        shape = self.extra_shapes(plan, round_).get(NEURONS)
        if shape is None:
            return {}
        spec = frame.specs.get(NEURONS)
        if spec is None or spec.shape != shape:
            raise WrongShape(
                "an update of this round must report how often each neuron was inactive",
                field=NEURONS,
                limit=list(shape),
                value="missing" if spec is None else list(spec.shape),
            )
        shares = decode_floats(frame, NEURONS)
        for extreme in (shares.min().item(), shares.max().item()):
            if not 0 <= extreme <= 1:
                raise InvalidField(
                    "a neuron's inactivity must be a share of the tokens",
                    field=NEURONS,
                    limit=[0, 1],
                    value=extreme,
                )
        return {NEURONS: shares}

    def is_rebuild_due(self, plan: RunPlan, round_: int) -> bool:
        return distillation_of(plan).is_due(round_, plan.federation.rounds)

    def rebuild(self, work: Rebuild) -> RebuiltModel:
        """Distil the proxy again, on the same images as before the run, and write the head."""
        plan, files = work.plan, work.files
        proxy, head = files.weights_after(work.round), files.head_after(work.round)
        if not proxy.is_file():
            _write_proxy(work)
        _, sha256 = write_head_file(plan.model, proxy, head, plan.wire.head)
        for folder in (proxy.parent, head.parent, files.root):
            sync_folder(folder)
        return RebuiltModel(proxy, BlobRef(sha256=sha256, nbytes=head.stat().st_size))


def _write_proxy(work: Rebuild) -> None:
    plan = work.plan
    backbone = prepare_backbone(plan.model, plan.model.weights, work.cache_dir)
    weights = redistil_proxy(
        plan.model,
        open_backbone(backbone.path),
        open_backbone(work.weights),
        work.files.read_state(work.state),
        work.files.read_extras(work.round)[NEURONS],
        load_images(plan, find_image_file(plan, work.cache_dir)),
        distillation_of(plan),
        derive_seed(plan.seed, "proxy", work.round),
        work.check,
    )
    require_finite(weights)
    write_tensors(work.files.weights_after(work.round), weights, {"backbone": plan.model.backbone})
