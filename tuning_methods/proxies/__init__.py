"""Smaller stand-ins for the backbone, distilled from it."""
