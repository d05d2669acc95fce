"""Measure the accuracy with hostile devices, for each attack and aggregation rule."""
