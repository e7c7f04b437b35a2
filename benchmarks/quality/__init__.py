"""What the quality benchmark trains, and what it makes of the results."""
