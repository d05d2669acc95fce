"""Files that the device keeps: identity, blobs, global states."""
