"""Benchmarks: whole runs on one machine, comparisons of methods, costs, and the engine's speed."""
