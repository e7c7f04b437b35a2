"""Low-rank adaptation: train, combine, merge, convert and serve adapters."""
