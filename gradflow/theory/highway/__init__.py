"""The mean-field theory of highway layers, y = t h + (1 - t) x."""
