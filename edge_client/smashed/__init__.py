"""The frozen head's outputs: cached on the device, uploaded once."""
