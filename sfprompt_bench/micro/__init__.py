"""Scripts: the time of each codec, and the memory of one device step."""
