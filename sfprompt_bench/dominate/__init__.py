"""The default form against every other method, over sizes, data sets and partitions."""
