"""What `benchmarks/train.py` runs: the sides, the machine they run on, and what their figures are held to."""
