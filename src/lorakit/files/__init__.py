"""An adapter as a folder in PEFT's format: written, read, checked against its base, replaced whole."""
