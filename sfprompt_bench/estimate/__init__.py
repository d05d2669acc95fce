"""The cost of tuning, calculated: traffic, compute and memory of a device, for every method.

Nothing is run and no weights are needed, so any backbone of timm can be asked for.
"""

from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question
from sfprompt_bench.estimate.calculator import estimate, paper_training
from sfprompt_bench.estimate.methods import METHODS, Method
from sfprompt_bench.estimate.report import Ratios, estimate_report, estimate_table, ratios

__all__ = [
    "METHODS",
    "Method",
    "MethodCost",
    "Question",
    "Ratios",
    "estimate",
    "estimate_report",
    "estimate_table",
    "paper_training",
    "ratios",
]
