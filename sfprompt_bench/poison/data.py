"""What the tail reads of all images, computed once, and dealt out to devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.torch_model import read as read_tensors
from protocol.codecs.registry import as_decoded
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from sfprompt_bench.methods.pooled import PooledModel
from sfprompt_bench.poison.attacks import TARGET, Device, flipped

_BATCH = 100

_PATCH = 1 / 6  # of an image's side


@dataclass(frozen=True)
class Tokens:
    """What the tail reads of images.

    Attributes:
        plain: flattened, [n, q], float16.
        patched: of the same images with a backdoor's patch.
        labels: [n].
    """

    plain: Tensor
    patched: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PoisonData:
    """The training images of all devices, and the held-out images.

    Attributes:
        train: their tokens.
        test: of the held-out images.
        shards: the positions of each device's training images.
    """

    train: Tokens
    test: Tokens
    shards: Sequence[Tensor]

    def device(self, number: int, attack: str | None, classes: int) -> tuple[Device, Tensor]:
        """Return a device, and the tokens of its samples [n, q].

        Args:
            number: of the device.
            attack: of it; None: it is honest.
            classes: their number.
        """
        part = self.shards[number]
        tokens, labels = self.train.plain[part], self.train.labels[part]
        if attack == "label-flip":
            labels = flipped(labels, classes)
        elif attack == "backdoor":
            tokens = torch.cat([tokens, self.train.patched[part]])
            labels = torch.cat([labels, torch.full_like(labels, TARGET)])
        return Device(number, attack, labels), tokens


def prepare_data(plan: RunPlan, data: Dataset, devices: int) -> PoisonData:
    """Run all images through head, codec and body, and deal the training images out at random."""
    model = PooledModel(plan, data)
    train, test = _tokens_of(model, model.train), _tokens_of(model, model.test)
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "poison"))
    order = torch.randperm(len(train.labels), generator=generator)
    size = len(order) // devices
    return PoisonData(train, test, order[: size * devices].split(size))


@torch.no_grad()
def _tokens_of(model: PooledModel, samples: BatchReader) -> Tokens:
    codec = model.plan.wire.smashed

    def read(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        tokens, labels = [], []
        for positions in torch.arange(len(samples)).split(_BATCH):
            images, classes = read_tensors(samples, positions.numpy())
            smashed = as_decoded(model.head(change(images)), codec)
            tokens.append(model.body(smashed, None).flatten(1).half())
            labels.append(classes)
        return torch.cat(tokens), torch.cat(labels)

    plain, labels = read(lambda images: images)
    patched, _ = read(_add_patch)
    return Tokens(plain, patched, labels)


def _add_patch(images: Tensor) -> Tensor:
    """Make the lower right corner of images [B, 3, H, W] as bright as their brightest pixel."""
    side = max(1, round(_PATCH * images.shape[-1]))
    patched = images.clone()
    patched[..., -side:, -side:] = images.amax()
    return patched
