"""Aggregation: the next global state from the participants' updates."""
