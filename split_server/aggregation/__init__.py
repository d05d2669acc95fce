"""Rules that turn the participants' updates into the next global state."""
