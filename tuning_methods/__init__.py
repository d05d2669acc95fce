"""Tuning methods: a package for each, with its settings and its code for device and server."""
