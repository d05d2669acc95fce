"""Accuracy with hostile devices: attacks on the model, under each aggregation rule."""
