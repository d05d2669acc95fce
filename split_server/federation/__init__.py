"""Runs, rounds and participants: every decision of the federation plane."""
