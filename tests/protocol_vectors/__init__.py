"""The protocol's test vectors, written byte by byte from SPEC.md, independently of `protocol`."""
