"""The device: its data, the phases of a round, and the way to the server."""
