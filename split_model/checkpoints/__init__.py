"""Tensor files of a run: head, global state and exported model."""
