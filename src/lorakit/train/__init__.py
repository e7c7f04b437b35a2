"""Training: data, packing, the fast step, the Trainer that uses them."""
