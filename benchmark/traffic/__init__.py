"""The ladder of traffic: from the paper's form to the default, a rung for each measure."""

from benchmark.traffic.ladder import Climb, Setting, climb
from benchmark.traffic.report import (
    large_table,
    phase_table,
    plot_ladder,
    traffic_figures,
    traffic_table,
)
from benchmark.traffic.rungs import Rung, ladder

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
