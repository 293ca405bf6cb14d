"""Training on tasks with a known optimum."""
