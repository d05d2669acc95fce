"""Peak memory of one training step of a device: prints it, and its parts, as JSON.

    python -m sfprompt_bench.micro.device_step MODEL HEAD_FILE STATE_FILE

MODEL is a `ModelPlan` as JSON. tests/integration/test_device_memory.py starts this script, so that
nothing else allocates memory in its process.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from edge_client.torch_model import TorchModel
from protocol.plan import ModelPlan

BATCH = 32


def peak_bytes() -> int:
    """Read the peak of this process's resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm_up() -> None:
    """Make torch allocate the memory that it needs on first use, for any model."""
    layer = torch.nn.Linear(8, 8)
    layer(torch.randn(4, 8)).sum().backward()


def main() -> None:
    """Run one training step and print its memory in bytes."""
    settings = ModelPlan.model_validate_json(sys.argv[1])
    torch.set_num_threads(1)
    warm_up()
    before = peak_bytes()
    model = TorchModel.load(settings, Path(sys.argv[2]), Path(sys.argv[3]))
    images = torch.randn(BATCH, 3, settings.image_size, settings.image_size)
    labels = torch.arange(BATCH) % settings.num_classes
    saved: dict[int, int] = {}  # bytes by address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        smashed = model.head(images, model.prompts)
        features = torch.randn_like(smashed).requires_grad_()  # stands for the server's response
        loss = F.cross_entropy(model.tail(features), labels)
    loss.backward()
    smashed.backward(torch.randn_like(smashed))
    parts = sum(
        tensor.untyped_storage().nbytes()
        for part in (model.head, model.tail)
        for tensor in part.state_dict().values()
    )
    crossing = 4 * smashed.numel() * 4 + images.numel() * 4
    sys.stdout.write(
        json.dumps(
            {
                "extra_peak": peak_bytes() - before,
                "parts": parts,
                "activations": sum(saved.values()) + crossing,
            }
        )
    )


if __name__ == "__main__":
    main()
