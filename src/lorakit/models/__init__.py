"""Base models: loaded from a hub name, a folder or a GGUF file, quantised where asked."""
