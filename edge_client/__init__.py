"""The edge client: the device's data, a round's training phases, and requests to the server."""
