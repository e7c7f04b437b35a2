"""The engine: continuous batching, scheduling, sampling, and where adapters are held."""
