"""Federated averaging of the whole model."""
