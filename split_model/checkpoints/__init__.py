"""Tensor files of a run: head, global state, exported model."""
