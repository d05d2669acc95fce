"""The project's only import of timm and torchvision, which also works over a CPU-only torch.

torchvision's usual x86 wheel is built for CUDA. Over a CPU build of torch its import stops with
"operator torchvision::nms does not exist", because it registers meta functions for operators that
its unloadable C++ library would have declared. Declaring the two schemas is enough: transforms
and data sets work, and `torchvision.ops.nms` itself still raises a clear error.
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

# A library's declarations live as long as the object does.
_declared: list[Any] = []


def _import_torchvision() -> Any:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    make: Any = torch.library.Library  # torch leaves it untyped
    library = make("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


torchvision: Any = _import_torchvision()

timm: Any = importlib.import_module("timm")
