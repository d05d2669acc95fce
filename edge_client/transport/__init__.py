"""HTTP to the server: requests, metered connections, retries, and simulated links."""
