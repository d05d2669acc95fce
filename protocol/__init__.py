"""The contract of the two ends: frames, messages, codecs, limits and errors."""
