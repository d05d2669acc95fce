"""Mutated frames, messages and requests: what a decoder and a server do with them."""
