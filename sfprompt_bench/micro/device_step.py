"""One training step of a device in a process of its own: prints what it took, as JSON.

Run by test_device_memory.py with the paths of a head file and a state file.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from edge_client.model import DeviceModel
from protocol.plan import ModelPlan

BATCH = 32


def peak_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm_up() -> None:
    """What torch allocates on first use belongs to the libraries, not to the model."""
    layer = torch.nn.Linear(8, 8)
    layer(torch.randn(4, 8)).sum().backward()


def main() -> None:
    """Run one training step of a device and print its peak memory."""
    settings = ModelPlan.model_validate_json(sys.argv[1])
    torch.set_num_threads(1)
    warm_up()
    before = peak_bytes()
    model = DeviceModel.load(settings, Path(sys.argv[2]), Path(sys.argv[3]))
    images = torch.randn(BATCH, 3, settings.image_size, settings.image_size)
    labels = torch.arange(BATCH) % settings.num_classes
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        smashed = model.head(images, model.prompts)
        features = torch.randn_like(smashed).requires_grad_()  # what the server would answer
        loss = F.cross_entropy(model.tail(features), labels)
    loss.backward()
    smashed.backward(torch.randn_like(smashed))
    parts = sum(
        tensor.untyped_storage().nbytes()
        for part in (model.head, model.tail)
        for tensor in part.state_dict().values()
    )
    legs = 4 * smashed.numel() * 4 + images.numel() * 4
    sys.stdout.write(
        json.dumps(
            {
                "extra_peak": peak_bytes() - before,
                "parts": parts,
                "activations": sum(kept.values()) + legs,
            }
        )
    )


if __name__ == "__main__":
    main()
