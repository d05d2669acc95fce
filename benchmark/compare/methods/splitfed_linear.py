"""Split-federated tuning of a linear tail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from benchmark.compare.methods.splitfed import SplitFed


class SplitFedLinear(SplitFed):
    """Head and body are frozen, and the tail's last layer is tuned."""

    name = "splitfed-linear"
    what = "U-shaped SplitFed with frozen head and body: the tail alone is tuned, float32"
    costed_as = "splitfed-linear"
    tuned: ClassVar[Mapping[str, Any]] = {"tune": "classifier"}
