"""Runs under injected faults, whose results have to equal those of undisturbed runs."""
