"""Model files of a run: backbone, head, first state."""
