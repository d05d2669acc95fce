"""The command estimate: what every method costs one device, calculated without weights or a run."""
