"""Outputs of the head: cached on the device, uploaded once."""
