"""A plan's fields set one by one, for research and tests."""
