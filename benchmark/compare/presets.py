"""The comparison that needs no file."""

from __future__ import annotations

from benchmark.compare.comparison import Comparison

# Minutes on two cores: few digits, two devices, real weights.
QUICK = Comparison(
    name="quick",
    data="digits",
    devices=2,
    rounds=3,
    methods=("splitfed-linear", "sfprompt-paper", "sfprompt", "central", "linear-probe"),
    limit_train=400,
    limit_test=200,
    federation={"evaluate_every": 1},
)
