"""How many labels a curious server infers from the gradients of split training."""
