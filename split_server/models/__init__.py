"""The model files of a run: backbone, proxy, head and first global state."""
