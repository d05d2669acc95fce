"""Decoding and validation of the tensors in a frame."""
