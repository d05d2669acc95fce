"""The split server's engine, measured: throughput, round trips, the gain of batching, a soak."""
