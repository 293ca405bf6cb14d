"""Records of a run, and their way to a folder and back."""
