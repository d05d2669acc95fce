"""Runs, rounds and participants: every decision about who may send and what counts."""
