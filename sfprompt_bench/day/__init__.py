"""A simulated day: many devices that come and go, and what the server's resources do."""
