"""Engines elsewhere: vLLM, and replicas in a Ray cluster."""
