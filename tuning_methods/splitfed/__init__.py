"""SplitFed: head and tail on the device, the body on the server, no prompts."""
