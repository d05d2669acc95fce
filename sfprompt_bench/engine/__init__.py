"""The command engine: throughput, round trips, gain of batching and a soak of the split server."""
