"""Whole runs on one machine: server and devices as processes, measured and drawn."""
