"""The process and the device: threads, streams, clock, logging."""
