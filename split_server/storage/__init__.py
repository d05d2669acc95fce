"""Everything stored: database, run files, smashed data and traffic counters."""
