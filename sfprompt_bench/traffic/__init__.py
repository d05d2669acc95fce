"""The ladder of traffic: from the paper's form to the default, a rung for each measure."""

from sfprompt_bench.traffic.ladder import Climb, Rung, Setting, climb, ladder
from sfprompt_bench.traffic.report import (
    large_table,
    phase_table,
    plot_ladder,
    traffic_figures,
    traffic_table,
)

__all__ = [
    "Climb",
    "Rung",
    "Setting",
    "climb",
    "ladder",
    "large_table",
    "phase_table",
    "plot_ladder",
    "traffic_figures",
    "traffic_table",
]
