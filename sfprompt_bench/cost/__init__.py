"""Bytes, operations and memory of one device, calculated on the meta device without weights."""
