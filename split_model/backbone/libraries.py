"""The project's only import of timm and torchvision, which also works with a CPU-only torch.

The usual x86 wheel of torchvision is built for CUDA. With a CPU build of torch its import fails
with "operator torchvision::nms does not exist": torchvision registers meta functions for operators
that its C++ library, which cannot be loaded, would declare. Declaring the two schemas is enough:
transforms and data sets work, and `torchvision.ops.nms` still raises a clear error.
"""

import importlib
import sys
from typing import Any

import torch

__all__ = ["timm", "torchvision"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# The declarations live as long as this object.
_declared: list[Any] = []


def _import_torchvision() -> Any:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library_type: Any = torch.library.Library  # untyped in torch
    library = library_type("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


torchvision: Any = _import_torchvision()

timm: Any = importlib.import_module("timm")
