"""The configuration of a training run: the YAML file, its flags, and the documentation made from both."""
