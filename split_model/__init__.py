"""A timm backbone cut in head, body and tail, with soft prompts."""
