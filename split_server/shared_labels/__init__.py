"""Runs with shared labels: the server has labels, and does the tasks of the devices itself."""
