"""Decoding and validation of request bodies: each request is parsed once into a dataclass."""
