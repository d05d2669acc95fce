"""Tuning methods, a package each: settings, and the code of its own on device and server."""
