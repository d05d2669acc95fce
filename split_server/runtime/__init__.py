"""Process and device: threads, streams, clock, logging."""
