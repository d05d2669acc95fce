"""The frozen head in NumPy: embedding and first blocks of a vision transformer."""
