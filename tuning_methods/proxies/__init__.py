"""Proxies: smaller replacements for the backbone, distilled from it."""
