"""Methods of tuning: one class each, which settings make a run of it and what it costs a device."""
