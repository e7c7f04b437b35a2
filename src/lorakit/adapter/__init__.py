"""An adapter on a model: which layers it changes, how it is built, attached and detached."""
