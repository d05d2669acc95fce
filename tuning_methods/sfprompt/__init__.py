"""SFPrompt: prompts in the body (the default) or at the input, as published."""
