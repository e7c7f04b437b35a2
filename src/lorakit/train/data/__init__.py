"""Training data: rows, their formats and templates, and the tokens and labels made of them."""
