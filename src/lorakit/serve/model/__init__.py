"""The serving model: the base with paged attention and one product over many adapters, and its compiled loops."""
