"""Round 0: fit a run's first classifier in closed form, from features and their class sums."""
