"""Database, run files, samples and traffic counters."""
