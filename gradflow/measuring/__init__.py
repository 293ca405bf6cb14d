"""From a specification or a model to a Run."""
