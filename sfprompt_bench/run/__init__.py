"""The command run: one server and some devices on this machine."""
