"""Fed3R: the classifier in closed form, from sums over all devices' features."""
