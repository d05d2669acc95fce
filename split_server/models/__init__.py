"""The model files of a run: weights, head and first global state."""
