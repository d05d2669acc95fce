"""Scripts that time one codec or measure the memory of one device step."""
