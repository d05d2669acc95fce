"""The command compare: methods side by side on the same data, partition, seeds and backbone."""
