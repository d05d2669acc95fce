"""The command run: one server and several devices on this machine, each a process."""
