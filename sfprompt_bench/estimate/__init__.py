"""The cost of tuning, calculated: traffic, compute and memory of a device, for every method.

Nothing is run and no weights are needed, so any backbone of timm can be asked for.
"""

from sfprompt_bench.estimate.calculator import estimate, paper_training
from sfprompt_bench.estimate.headline import ComputeFit, Headline, TrafficFit, headline
from sfprompt_bench.estimate.method_cost import MethodCost
from sfprompt_bench.estimate.methods import METHODS, Method
from sfprompt_bench.estimate.question import Question
from sfprompt_bench.estimate.report import Ratios, estimate_report, estimate_table, ratios

__all__ = [
    "METHODS",
    "ComputeFit",
    "Headline",
    "Method",
    "MethodCost",
    "Question",
    "Ratios",
    "TrafficFit",
    "estimate",
    "estimate_report",
    "estimate_table",
    "headline",
    "paper_training",
    "ratios",
]
