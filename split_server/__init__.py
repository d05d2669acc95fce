"""The server: runs and rounds on one plane, the frozen body's forward and backward on the other."""
