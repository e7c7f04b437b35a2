"""What an adapted layer is: deltas, layouts, storages, routing, and the one gated product. It knows no method and no model."""
