"""The cost of tuning, calculated: traffic, compute and memory of a device, for every method.

Nothing is run and no weights are needed, so any backbone of timm can be asked for.
"""

from benchmark.estimate.calculator import estimate, paper_training
from benchmark.estimate.comparison import Ratios, ratios
from benchmark.estimate.headline import ComputeFit, Headline, TrafficFit, headline
from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods import METHODS, Method
from benchmark.estimate.question import Question
from benchmark.estimate.report import estimate_report, estimate_table

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
