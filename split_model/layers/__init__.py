"""Layers that the split model adds to or changes in timm's blocks."""
