"""The training step: batches without padding, attention over shared prefixes, the loss, fused functions, memory."""
