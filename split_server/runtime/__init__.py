"""Process and device: threads, streams, clock and logging."""
