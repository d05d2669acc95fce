"""Runs of the default form with random settings: none may end below its start."""
