"""The methods of a comparison: one class each, with its settings and its cost for a device."""
