"""Every method side by side: the same data, parts, seeds and backbone, in one command."""
