"""Files on the device: identity, cached blobs of the server, global states."""
