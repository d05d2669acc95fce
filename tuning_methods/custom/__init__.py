"""Every mechanism of a plan by hand, for research and tests."""
