"""SplitFed: head, body and tail on two sides, without prompts."""
