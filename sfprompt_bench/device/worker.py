"""A process that loads a head as a device does, computes with it, and prints what it took."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.model import Model
from protocol.plan import ModelPlan

_KIB_PER_MB = 1000**2 / 1024


def load(compute: str, plan: ModelPlan, head: Path, state: Path) -> Model:
    """Load the model with one library; the other is not imported."""
    if compute == "torch":
        import torch

        from edge_client.torch_model import TorchModel

        torch.set_num_threads(1)
        return TorchModel.load(plan, head, state)
    from edge_client.linear_model import LinearModel

    model = LinearModel.load(plan, head, state)
    if model is None:
        raise ValueError(f"NumPy cannot compute the head of {plan.backbone}")
    return model


def measure(model: Model, batch: int, seconds: float) -> dict[str, Any]:
    """Compute smashed data of batches for some seconds."""
    side = model.settings.image_size
    images = np.random.default_rng(0).standard_normal((batch, 3, side, side)).astype(np.float32)
    model.smashed(images)
    wall: list[float] = []
    cpu = time.process_time()
    end = time.perf_counter() + seconds
    while not wall or time.perf_counter() < end:
        began = time.perf_counter()
        model.smashed(images)
        wall.append(time.perf_counter() - began)
    cpu = time.process_time() - cpu
    return {
        "batch": batch,
        "samples_per_s": batch / min(wall),
        "cpu_s_per_sample": cpu / (len(wall) * batch),
    }


def _peak_mb() -> float:
    status = Path("/proc/self/status")  # getrusage counts the process that started this one
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_MB
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / _KIB_PER_MB


def main() -> None:
    """Print one JSON object: the arguments are library, plan, head, state, batches and seconds."""
    compute, plan, head, state, batches, seconds = sys.argv[1:]
    began = time.perf_counter()
    model = load(compute, ModelPlan.model_validate_json(plan), Path(head), Path(state))
    loaded_s = time.perf_counter() - began
    figures = [measure(model, int(batch), float(seconds)) for batch in batches.split(",")]
    result = {"loaded_s": loaded_s, "peak_mb": _peak_mb(), "batches": figures}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
