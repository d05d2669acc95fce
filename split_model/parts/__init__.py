"""Head, body and tail as modules."""
